"""The one place where settings have defaults. Experiments start from `defaults()` and say only what differs."""

from ml_collections import ConfigDict, config_dict

from flowlm.models import SIZES
from flowlm.objectives import NEEDS


def model(size: str) -> ConfigDict:
    """The `model` section at a named size: test, tiny, small. Other fields are the reference's."""
    return ConfigDict(
        dict(
            **SIZES[size],
            vocab_size=0,  # must equal the tokenizer's: a check that both sides are what you think they are
            dropout=0.0,
            input="raw",  # raw | scaled | posterior | both | white
            preview=False,  # for flow maps: also what the posterior will be a little later
            output="plain",  # plain | likelihood_skip | early_skip
            time_embeddings=1,  # 2 for a flow map, 0 for what knows no time
            time_scale=1.0,  # multiplies tau_s in the sinusoids
            end_time_scale=1.0,  # and tau_t; what is differentiated with respect to t should be smooth in it
            gate_init=0.0,  # residual branches start at this weight
            attention_cap=50.0,  # soft-cap of attention scores, 0: none
            attention="xla",  # xla | splash (TPU) | cudnn (GPU): how it is computed
            logit_cap=30.0,  # and of the output
            learned_positions=False,
            mask_token=False,  # for masked diffusion
            causal=False,
            remat="none",  # none | dots | full: what the backward pass recomputes, for memory
            dtype="float32",  # or bfloat16: products only; parameters, norms and losses stay float32
            loss_weight=False,  # learn exp(-w) loss + w with w a function of the times
        )
    )


def objective(family: str) -> ConfigDict:
    """The `objective` section of a family: flow, flow_map, residual, autoregressive, masked, uniform."""
    sampler = dict(
        temperature=config_dict.placeholder(
            float
        ),  # of drawn tokens in place of the posterior mean (flow), argmax (map)
        noise_scale=1.0,  # of every draw of noise; below 1: less diverse and more coherent
        guidance=1.0,  # 1: none; more: away from the same network with dropout
    )
    draws = dict(temperature=1.0, top_p=1.0)  # sampler
    student = dict(
        jump=1 / 32,  # the step in time that it learns to take at once
        divergence="reverse",  # reverse, KL(student || teacher) | forward
    )
    sections = dict(
        flow=dict(
            loss="cross_entropy",  # cross_entropy | squared_error | velocity
            eta=1.0,  # sampler: 0 Euler .. 1 ancestral
            **sampler,
        ),
        flow_map=dict(
            target="psd",  # psd | psd_squared | teacher_steps | residual | lsd | lsd_logit | csd | ecld | esd | esd_logit
            targets_from="student",  # student | ema
            diagonal=0.5,  # share of rows with s = t
            boundary=1 / 32,  # share of the others with (s, t) = (0, 1)
            pairs="uniform_diff",  # uniform_diff | uniform_pair
            tau_max=1.0,  # upper end of the others' tau_t
            cut="midpoint",  # midpoint | uniform
            teacher_steps=4,  # of the target of that name
            teacher_temperature=1.0,  # below 1: the flow of softmax(logits / temperature), less diverse and more coherent
            adaptive=0.0,  # exponent of the adaptive weight
            surgery=False,  # project conflicting gradients
            train_embedding=False,
            gamma=0.0,  # sampler: re-noising between steps, 0 none .. 1 all
            top_p=1.0,  # of drawn tokens
            **sampler,
        ),
        residual=dict(boundary=1 / 32, pairs="uniform_diff"),
        autoregressive=dict(start=0, **draws),  # the tokenizer's start token: a check, as model.vocab_size is
        masked=dict(greedy=False, **student, **draws),  # greedy: the sampler's last step takes the likeliest tokens
        uniform=dict(
            curriculum_steps=0,  # steps that show soft latents in place of tokens
            curriculum_temperature=0.05,
            greedy=False,
            **student,
            **draws,
        ),
    )
    if family not in sections:
        raise ValueError(f"unknown objective.family {family!r}: choose one of {sorted(sections)}")
    return ConfigDict(dict(family=family, **sections[family]))


def defaults(family: str = "flow") -> ConfigDict:
    """Every setting of a run of a family. Locked: a key that is not here is an error."""
    config = ConfigDict(
        dict(
            seed=0,
            steps=1000,
            batch_size=128,  # rows of the global batch
            accumulation=1,  # microbatches it is cut into
            ema_decay=0.999,
            prior="gaussian",  # gaussian | dirichlet
            time_warp="ambient",  # ambient | embedded | identity
            data=dict(name="sotu", tokenizer="sotu_bpe_512", length=32, dir="~/.cache/flowlm"),
            model=model("tiny"),
            objective=objective(family),
            teacher=config_dict.placeholder(str),  # run directory of the flow that a flow map is distilled from
            init_from=config_dict.placeholder(str),  # run directory whose averaged weights a fresh run starts from
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
            mesh=dict(
                replica=1,  # over slices, or groups of devices that are far apart
                data=-1,  # devices that the batch is split over; -1: all that are left
                model=1,  # devices that heads, hidden layers and the vocabulary are split over
                fsdp=False,  # split parameters, moving average and moments over `data`
                grad_reduce_dtype="float32",  # or bfloat16: half of the traffic
            ),
            checkpoint=dict(every=500, keep_latest=2, keep_every=0),
            evaluation=dict(
                every=1000,
                held_out=512,  # rows
                held_out_batch=256,  # of them in one call, over all devices
                taus=(0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95),
                steps=(1, 8, 64),
                samples=256,  # for each number of steps
                final_samples=1024,  # after the last step
                # Judges beside the usual ones: smollm2, hf:NAME, run:DIRECTORY (autoregressive), mauve:smollm2, mauve:hf:NAME
                language_models=(),
            ),
            log_every=20,
            tensorboard=False,
        )
    )
    config.model.update(NEEDS.get(family, {}))
    return config.lock()


def complete(config: ConfigDict) -> ConfigDict:
    """Saved settings, with the defaults of those that were not there yet when they were saved. Locked."""
    out = defaults(config.objective.family).unlock()
    if config.objective.family == "masked":
        out.objective.divergence = "forward"  # the only one while there was no such setting
    out.update(config)
    return out.lock()
