"""GPT-2 medium (350M) on OpenWebText, from scratch: the recipe of configs/gpt2.py at 24 layers, 16 heads, width 1024.

    python -m train.prepare --dataset=openwebtext --hf_dataset=Skylion007/openwebtext --tokenizer=gpt2
    python -m train --config=configs/gpt2_medium.py
    python -m train --config=configs/gpt2_medium.py --config.dry_run  # what it takes; nothing is run

355 million parameters. The same half million tokens an update, as 120 x 4 sequences of 1,024. nanoGPT publishes no run
from scratch at this size, and neither do we: not trained here. What to expect is bounded from above by OpenAI's own
weights on OpenWebText (configs/eval_gpt2_medium.py). The learning rate is GPT-3's for this size (Brown et al. 2020,
table 2.1).
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-gpt2-medium",
            dataset="openwebtext",
            n_layer=24,
            n_head=16,
            n_embd=1024,
            batch_size=4,
            block_size=1024,
            gradient_accumulation_steps=120,
            max_iters=600_000,
            lr_decay_iters=600_000,
            learning_rate=3e-4,
            min_lr=3e-5,
            eval_interval=1000,
            eval_iters=200,
            log_interval=10,
            weight_decay=1e-1,
        ).to_dict()
    )
