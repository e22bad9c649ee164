"""A character-level GPT on the works of Shakespeare, for one GPU: nanoGPT's config/train_shakespeare_char.py.

    python -m train.prepare --dataset=shakespeare_char
    python -m train --config=configs/shakespeare_char_gpu.py
    python -m core.generate --model=out-shakespeare-char-gpu/model --prompt="ROMEO:"

10.7 million parameters, 5,001 updates of 16,384 tokens. nanoGPT reports a best validation loss of 1.4697 after 3
minutes on an A100; it overfits from iteration 2,000 or so, and the best model is what is kept. Two cores take
hours: configs/shakespeare_char.py is the recipe for those.
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-shakespeare-char-gpu",
            eval_interval=250,
            eval_iters=200,
            log_interval=10,
            always_save_checkpoint=False,
            wandb_project="shakespeare-char",
            wandb_run_name="mini-gpt",
            dataset="shakespeare_char",
            gradient_accumulation_steps=1,
            batch_size=64,
            block_size=256,
            n_layer=6,
            n_head=6,
            n_embd=384,
            dropout=0.2,
            learning_rate=1e-3,
            max_iters=5000,
            lr_decay_iters=5000,
            min_lr=1e-4,
            beta2=0.99,
            warmup_iters=100,
        ).to_dict()
    )
