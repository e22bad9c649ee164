"""A small character-level GPT on the works of Shakespeare, for a laptop: nanoGPT's recipe for machines without a GPU.

    python -m train.prepare --dataset=shakespeare_char
    python -m train --config=configs/shakespeare_char.py
    python -m core.generate --model=out-shakespeare-char/model --prompt="ROMEO:"

0.8 million parameters, 2,001 updates of 768 tokens: about two minutes on two cores. Validation loss 1.89 to 1.91
over the whole split, 1.87 to 1.92 over the recipe's 20 batches (docs/training.md); nanoGPT reports 1.88 for those.
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-shakespeare-char",
            dataset="shakespeare_char",
            eval_interval=250,
            eval_iters=20,
            log_interval=1,
            always_save_checkpoint=False,
            gradient_accumulation_steps=1,
            batch_size=12,
            block_size=64,
            n_layer=4,
            n_head=4,
            n_embd=128,
            dropout=0.0,
            learning_rate=1e-3,
            max_iters=2000,
            lr_decay_iters=2000,
            min_lr=1e-4,
            beta2=0.99,
            warmup_iters=100,
        ).to_dict()
    )
