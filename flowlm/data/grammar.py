"""A weighted grammar: it draws rows from a known law and computes the exact probability of any row.

A grammar is a table (`grammars/*.json`) of rules A -> alternatives. An alternative is a string of words and nonterminals
with a probability; a list of alternatives is uniform. A rule whose name holds "{parameter}" stands for one rule for each
value of the parameter, which is how agreement is written. In other rules, an alternative that holds "{parameter}" stands for
one alternative for each value. Parameters are filled in in their order, so "{thing.{class}}" takes the values of
"thing.fruit" where the class is fruit. Grammars are finite: no symbol derives itself.

With p_j the probability that the symbols so far have read exactly the first j words of a row, reading is linear:
    word w           p'_{j+1} = p_j [row_j = w]
    A B              p' = B(A(p))
    A -> a_1 | ...   p' = sum_k P(a_k) a_k(p)
so `log_prob` sums over all derivations exactly, and sampling walks the same tree with sets of rows.
The entropy of derivations obeys H(A) = sum_k P(a_k) (-log P(a_k) + sum of H over the symbols of a_k). It equals the
entropy of rows if no row has two derivations, which holds for the shipped grammars.
"""

import dataclasses
import functools
import json
import math
import pathlib

import numpy as np

_SHIPPED = pathlib.Path(__file__).parent / "grammars"

# A symbol of an alternative: the id of a word, or the name of a nonterminal.
Symbol = int | str


@dataclasses.dataclass(frozen=True)
class Rule:
    """Alternatives of one nonterminal: their probabilities [K] and the K strings of symbols."""

    probabilities: np.ndarray
    alternatives: tuple[tuple[Symbol, ...], ...]

    @functools.cached_property
    def cumulative(self) -> np.ndarray:
        """Cumulative sums [K] of the probabilities; the last sum is 1."""
        sums = self.probabilities.cumsum()
        return sums / sums[-1]

    @functools.cached_property
    def is_lexical(self) -> bool:
        """Whether every alternative is one word; such a rule is read and drawn in one step."""
        return all(len(symbols) == 1 and isinstance(symbols[0], int) for symbols in self.alternatives)

    @functools.cached_property
    def words(self) -> np.ndarray:
        """Ids [K] of the alternatives of a lexical rule."""
        return np.array([symbols[0] for symbols in self.alternatives], np.int32)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A grammar over `words` (in order of their ids) whose rows have `length` ids, padded at the end with `pad`."""

    words: tuple[str, ...]
    pad: int
    length: int
    start: str
    rules: dict[str, Rule]

    @classmethod
    def load(cls, name: str) -> "Grammar":
        """Reads a shipped grammar by its name, or a file by its path, which ends in .json.

        Raises:
          ValueError: the name is unknown, or the table is not a finite grammar over its words.
        """
        path = pathlib.Path(name) if name.endswith(".json") else _SHIPPED / f"{name}.json"
        if not path.is_file():
            raise ValueError(f"unknown grammar {name!r}; known are {', '.join(shipped_names())}")
        table = json.loads(path.read_text("utf-8"))
        words = tuple(" ".join(table["words"]).split())
        ids = {word: i for i, word in enumerate(words)}
        if len(ids) < len(words):
            raise ValueError(f"grammar {name!r} lists a word twice")
        templates = table["rules"]
        for parameter, lines in table["parameters"].items():
            values = [value for line in lines for value in line.split() or [""]]
            templates = _expand(templates, "{" + parameter + "}", values)
        rules = {left: _rule(left, alternatives, ids, templates) for left, alternatives in templates.items()}
        grammar = cls(words, ids[table["pad"]], table["length"], table["start"], rules)
        if grammar._longest() > grammar.length:
            raise ValueError(f"grammar {name!r} derives rows of more than its {grammar.length} words")
        return grammar

    def _longest(self) -> int:
        """Number of words in the longest row."""
        lengths: dict[Symbol, int | None] = {}

        def longest(symbol: Symbol) -> int:
            if isinstance(symbol, int):
                return 1
            if symbol not in lengths:
                lengths[symbol] = None  # until it is known, so that a symbol that derives itself is found
                alternatives = self.rules[symbol].alternatives
                lengths[symbol] = max(sum(map(longest, symbols)) for symbols in alternatives)
            if lengths[symbol] is None:
                raise ValueError(f"symbol {symbol!r} derives itself; a grammar must be finite")
            return lengths[symbol]

        return longest(self.start)

    @functools.cached_property
    def entropy(self) -> float:
        """Exact entropy of a row in nats."""

        @functools.cache
        def entropy_of(symbol: Symbol) -> float:
            if isinstance(symbol, int):
                return 0.0
            rule = self.rules[symbol]
            inner = [sum(map(entropy_of, symbols)) for symbols in rule.alternatives]
            return sum(p * (h - math.log(p)) for p, h in zip(rule.probabilities, inner))

        return float(entropy_of(self.start))

    def sample(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Draws rows int32 [num, length] from the law of the grammar."""
        ids = np.full((num, self.length), self.pad, np.int32)
        ends = np.zeros(num, np.int64)

        def write(symbol: Symbol, rows: np.ndarray) -> None:
            if isinstance(symbol, int):
                ids[rows, ends[rows]] = symbol
                ends[rows] += 1
                return
            rule = self.rules[symbol]
            # Draws as rng.choice does, without summing the probabilities again.
            choices = np.searchsorted(rule.cumulative, rng.random(len(rows)), side="right")
            if rule.is_lexical:
                ids[rows, ends[rows]] = rule.words[choices]
                ends[rows] += 1
                return
            for choice in np.unique(choices):
                chosen = rows[choices == choice]
                for part in rule.alternatives[choice]:
                    write(part, chosen)

        write(self.start, np.arange(num))
        return ids

    def log_prob(self, ids: np.ndarray) -> np.ndarray:
        """Exact log-probabilities float64 [N], in nats, of rows of ids [N, length]; -inf where ungrammatical.

        Raises:
          ValueError: rows are not of the grammar's length.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.shape[1] != self.length:
            raise ValueError(f"rows of shape {ids.shape}; the grammar reads ids of shape [N, {self.length}]")
        # An id that is no word (a start token, say) gets an index past the words, which no rule derives.
        columns = np.where((ids >= 0) & (ids < len(self.words)), ids, len(self.words)).T

        # The arrays `before` and `after` of probabilities are [length + 1, N], columns are [length, N].
        def read(symbol: Symbol, before: np.ndarray, columns: np.ndarray) -> np.ndarray:
            after = np.zeros_like(before)
            if isinstance(symbol, int):
                after[1:] = before[:-1] * (columns == symbol)
                return after
            rule = self.rules[symbol]
            if rule.is_lexical:
                weights = np.zeros(len(self.words) + 1)
                np.add.at(weights, rule.words, rule.probabilities)
                after[1:] = before[:-1] * weights[columns]
                return after
            # To save time, only rows that have been read so far go on, with alternatives that one of their next words can begin.
            live = np.flatnonzero(before.any(0))
            before, columns = before[:, live], columns[:, live]
            following = set(columns[before[:-1] > 0].tolist())
            for probability, symbols in zip(rule.probabilities, rule.alternatives):
                if symbols and isinstance(symbols[0], int) and symbols[0] not in following:
                    continue
                part = probability * before
                for inner in symbols:
                    part = read(inner, part, columns)
                    if not part.any():
                        break
                after[:, live] += part
            return after

        before = np.zeros((self.length + 1, len(ids)))
        before[0] = 1.0
        read_all = read(self.start, before, columns)
        padded_from = np.ones_like(before)
        padded_from[:-1] = np.logical_and.accumulate((columns == self.pad)[::-1])[::-1]
        with np.errstate(divide="ignore"):
            return np.log((read_all * padded_from).sum(0))


def shipped_names() -> list[str]:
    """Names of the grammars that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def _expand(templates: dict, parameter: str, values: list[str]) -> dict:
    """Fills in one parameter: a rule with the parameter in its name becomes one rule for each value; see `_filled` for others."""
    expanded = {}
    for left, alternatives in templates.items():
        for chosen in [[value] for value in values] if parameter in left else [values]:
            expanded[left.replace(parameter, chosen[0])] = _filled(alternatives, parameter, chosen)
    return expanded


def _filled(alternatives: dict | list, parameter: str, values: list[str]) -> dict | list:
    """Writes an alternative that holds the parameter once for each value; these copies share the alternative's probability."""

    def written(text: str) -> list[str]:
        return [text.replace(parameter, value) for value in values] if parameter in text else [text]

    if isinstance(alternatives, list):
        return [filled for text in alternatives for filled in written(text)]
    return {filled: weight / len(written(text)) for text, weight in alternatives.items() for filled in written(text)}


def _rule(left: str, alternatives: dict | list, ids: dict[str, int], names: dict) -> Rule:
    if isinstance(alternatives, list):
        alternatives = [(text, 1 / len(alternatives)) for text in alternatives]
    else:
        alternatives = list(alternatives.items())
    probabilities = np.array([probability for _, probability in alternatives])
    if (probabilities <= 0).any() or not math.isclose(probabilities.sum(), 1.0, abs_tol=1e-9):
        raise ValueError(f"rule {left!r}: probabilities must be positive and sum to 1, not {probabilities}")
    strings = []
    for text, _ in alternatives:
        unknown = [symbol for symbol in text.split() if symbol not in names and symbol not in ids]
        if unknown:
            raise ValueError(f"rule {left!r}: {unknown[0]!r} is neither a word nor a rule")
        strings.append(tuple(symbol if symbol in names else ids[symbol] for symbol in text.split()))
    return Rule(probabilities, tuple(strings))
