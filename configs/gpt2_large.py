"""GPT-2 large (774M) on OpenWebText, from scratch: the recipe of configs/gpt2.py at 36 layers, 20 heads, width 1280.

    python -m train.prepare --dataset=openwebtext --hf_dataset=Skylion007/openwebtext --tokenizer=gpt2
    python -m train --config=configs/gpt2_large.py
    python -m train --config=configs/gpt2_large.py --config.dry_run  # what it takes; nothing is run

774 million parameters. The same half million tokens an update, as 240 x 2 sequences of 1,024. nanoGPT publishes no run
from scratch at this size, and neither do we: not trained here. What to expect is bounded from above by OpenAI's own
weights on OpenWebText (configs/eval_gpt2_large.py). The learning rate is GPT-3's for this size (Brown et al. 2020,
table 2.1).
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-gpt2-large",
            dataset="openwebtext",
            n_layer=36,
            n_head=20,
            n_embd=1280,
            batch_size=2,
            block_size=1024,
            gradient_accumulation_steps=240,
            max_iters=600_000,
            lr_decay_iters=600_000,
            learning_rate=2.5e-4,
            min_lr=2.5e-5,
            eval_interval=1000,
            eval_iters=200,
            log_interval=10,
            weight_decay=1e-1,
        ).to_dict()
    )
