"""The one place where settings have defaults. Experiments start from `defaults()` and say only what differs."""

from ml_collections import ConfigDict, config_dict

from flowlm.models import SIZES


def model(size: str) -> ConfigDict:
    """The `model` section at a named size: test, tiny, small. Other fields are the reference's."""
    return ConfigDict(
        dict(
            **SIZES[size],
            vocab_size=0,  # must equal the tokenizer's: a check that both sides are what you think they are
            dropout=0.0,
            input="raw",  # raw | scaled | posterior | both
            output="plain",  # plain | likelihood_skip
            time_embeddings=1,  # 2 for a flow map
            time_scale=1.0,  # multiplies tau in the sinusoids
            gate_init=0.0,  # residual branches start at this weight
            learned_positions=False,
            causal=False,
            remat="none",  # none | dots | full: what the backward pass recomputes, for memory
            dtype="float32",  # or bfloat16: products only; parameters, norms and losses stay float32
        )
    )


def defaults() -> ConfigDict:
    """Every setting of a run. Locked: a key that is not here is an error."""
    config = ConfigDict(
        dict(
            seed=0,
            steps=1000,
            batch_size=128,  # rows of the global batch
            accumulation=1,  # microbatches it is cut into
            ema_decay=0.999,
            prior="gaussian",  # gaussian | dirichlet
            time_warp="ambient",  # ambient | embedded
            data=dict(name="sotu", tokenizer="sotu_bpe_512", length=32, dir="~/.cache/flowlm"),
            model=model("tiny"),
            objective=dict(
                family="flow",
                loss="cross_entropy",  # cross_entropy | squared_error
                eta=1.0,  # sampler: 0 Euler .. 1 ancestral
                temperature=config_dict.placeholder(float),  # of a drawn token in place of the posterior mean
            ),
            optimizer=dict(
                learning_rate=1e-3,
                schedule="cosine",  # constant | cosine
                warmup_steps=100,
                b1=0.9,
                b2=0.999,
                weight_decay=0.0,
                decay_pattern="kernel$",  # parameters that decay
                clip_norm=1.0,
            ),
            mesh=dict(data=-1),  # devices; -1 is all
            checkpoint=dict(every=500, keep_latest=2, keep_every=0),
            evaluation=dict(
                every=1000,
                held_out=512,  # rows
                taus=(0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95),
                steps=(1, 8, 64),
                samples=256,  # for each number of steps
                final_samples=1024,  # after the last step
            ),
            log_every=20,
            tensorboard=False,
        )
    )
    return config.lock()
