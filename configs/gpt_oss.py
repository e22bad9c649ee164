"""A tiny GPT-OSS on the works of Shakespeare, from scratch: experts, sinks and windows on a laptop.

    python -m train.prepare --dataset=shakespeare_char
    python -m train --config=configs/gpt_oss.py
    python -m core.generate --model=out-gpt-oss/model --prompt="ROMEO:"

OpenAI's architecture (rotary positions, grouped queries, attention sinks, a sliding window in every other layer, a
mixture of experts) at 4 layers, width 64, 8 experts of which a token meets 2: 460,272 parameters, 156,592 of them for
a token. Validation loss 1.90 after 1,001 updates of 768 tokens (one seed, 20 batches), some three minutes on two cores.
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-gpt-oss",
            dataset="shakespeare_char",
            eval_interval=250,
            eval_iters=20,
            always_save_checkpoint=False,
            gradient_accumulation_steps=1,
            batch_size=12,
            block_size=64,
            family="gpt_oss",
            n_layer=4,
            n_head=4,
            n_kv_head=2,
            n_embd=64,
            n_expert=8,
            experts_per_token=2,
            sliding_window=16,
            learning_rate=1e-3,
            max_iters=1000,
            lr_decay_iters=1000,
            min_lr=1e-4,
            beta2=0.99,
            warmup_iters=100,
        ).to_dict()
    )
