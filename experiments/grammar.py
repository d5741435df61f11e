from flowlm.config import defaults


def get_config(arg: str = ""):
    config = defaults()
    config.steps = 3600
    config.data.update(name="grammar98", tokenizer="grammar98", length=19)
    config.model.update(vocab_size=99, input=arg or "both", time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.evaluation.update(every=1200, steps=(1, 8, 64), samples=512, final_samples=2048)
    return config
