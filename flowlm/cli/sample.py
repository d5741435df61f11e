"""`flowlm sample`: texts to standard output or a file, and how they were made to standard error."""

import json
import sys
from collections.abc import Iterator

from absl.flags import FlagValues

from flowlm.cli.command import Command, switch, text, whole, words
from flowlm.cli.sampler_flags import CHECKPOINT, OBJECTIVE, SAMPLER, SEED, changed_objective, step_counts


def _sample(values: FlagValues) -> None:
    counts, objective = step_counts(values, [64]), changed_objective(values)
    if values.json and values.delimiter is not None:
        raise ValueError("--json writes an object a line, so nothing stands between texts: leave out --delimiter")

    prompt = _prompts(values)

    import flowlm
    from flowlm.runs.model import check_drawing
    from flowlm.system import storage

    out = None if values.out is None else storage.path(values.out)
    if out is not None:
        storage.check_writable_file(out)
    length = values.max_tokens, values.tail
    check_drawing(values.checkpoint, counts, values.sampler, prompt, *length, **objective)
    model = flowlm.load(values.checkpoint, **objective)
    if model.follows_prompts == "replacement" and (prompt or (values.max_tokens or 0) >= model.config.data.length):
        what = "prompts: followed" if prompt else "prompts: a further block goes on"
        _tell(f"trained without {what} by replacement, an approximation that one step knows nothing of")
    written = []
    for steps in counts:
        drawn = model.draw(values.num, steps, values.seed, values.sampler, prompt, *length)
        _tell(f"{drawn.sampler}, {_number(steps, 'step')}, seed {drawn.seed}")
        for line in _json_lines(drawn) if values.json else _lines(drawn.texts, values.delimiter):
            if out is None:
                print(line)
            else:
                written.append(f"{line}\n")
        sys.stdout.flush()  # so that the texts come before what standard error says of them
        _tell(
            f"{_number(len(drawn.texts), 'text')} in {drawn.seconds:.2f} s, after {drawn.compile_seconds:.1f} s of compiling"
        )
    if out is not None:
        out.write_text("".join(written), encoding="utf-8")
        _tell(f"in {out}")


def _prompts(values: FlagValues) -> list[str] | None:
    """What texts go on from, or None. Raises ValueError: both flags are given, or the file cannot be read."""
    if values.prompt is not None and values.prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if values.prompts is None:
        return None if values.prompt is None else [values.prompt]
    from flowlm.data import json_lines
    from flowlm.system import storage

    place = storage.path(values.prompts)
    if not place.is_file():
        raise ValueError(f'there is no file {place}: --prompts takes one with {{"prompt": TEXT}} a line')
    return [prompt for _, prompt in json_lines.texts(place, "prompt")]


def _tell(words: str) -> None:
    print(words, file=sys.stderr)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _json_lines(drawn) -> Iterator[str]:
    """A JSON object for each text of a flowlm.runs.model.Samples."""
    for index, written in enumerate(drawn.texts):
        facts = {"sampler": drawn.sampler, "steps": drawn.steps, "seed": drawn.seed, "index": index}
        prompt = {"prompt": drawn.prompts[index]} if drawn.prompts else {}
        yield json.dumps({"text": written} | facts | prompt)


def _lines(texts: list[str], delimiter: str | None) -> Iterator[str]:
    """The texts, each with a delimiter behind it where one is given or a text has line breaks; then no text has such a line."""
    if delimiter is None and any("\n" in written for written in texts):
        delimiter, taken = "---", {line for written in texts for line in written.split("\n")}
        while delimiter in taken:
            delimiter += "-"
        _tell(f"texts have line breaks, so a line {delimiter} ends each: --delimiter=WORDS is another")
    for written in texts:
        yield written
        if delimiter is not None:
            yield delimiter


SAMPLE = Command(
    "sample",
    "writes text with a trained run",
    [
        CHECKPOINT,
        words("steps", "N,N,...", "network calls, or several numbers of them (default: 64)"),
        whole("num", "how many samples", 8, 1),
        text("prompt", "TEXT", "what texts go on from: `___` is a token to write, `___:3` three, `...` the rest"),
        text("prompts", "FILE", 'several: {"prompt": TEXT} a line, --num texts of each'),
        whole("max_tokens", "cut texts at their end, at the latest here; beyond a row they go on in blocks", None, 1),
        whole("tail", "tokens that a further block goes on from (default: half of a row's)", None, 1),
        SAMPLER,
        SEED,
        OBJECTIVE,
        switch("json", "a JSON object a line: text, sampler, steps, seed, index and prompt"),
        text("out", "FILE", "where the texts go, in place of standard output"),
        text("delimiter", "WORDS", "a line behind each text; `---` where a text has line breaks and none is given"),
    ],
    _sample,
    needs=("checkpoint",),
    place="checkpoint",
    notes="How the texts were made goes to standard error, so that they can be piped.",
)
