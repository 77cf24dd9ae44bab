"""Presets that the pre-training experiments share."""

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "model.d_model": 64, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 32,
        "model.active_width": 128, "data.vocab_size": 512, "data.length": 64, "data.batch": 8,
        "data.validation_rows": 32, "loop.steps": 40, "loop.evaluate_every": 20, "loop.save_every": 20, "samples": 2,
    },
    "quick": {"loop.steps": 150, "loop.evaluate_every": 50, "loop.save_every": 50},
}
