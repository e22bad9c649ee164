"""GPT-2 xl (1.5B) on OpenWebText, from scratch: the recipe of configs/gpt2.py at 48 layers, 25 heads, width 1600.

    python -m train.prepare --dataset=openwebtext --hf_dataset=Skylion007/openwebtext --tokenizer=gpt2
    python -m train --config=configs/gpt2_xl.py
    python -m train --config=configs/gpt2_xl.py --config.dry_run  # what it takes; nothing is run

1.56 billion parameters. The same half million tokens an update, as 480 x 1 sequences of 1,024. nanoGPT publishes no run
from scratch at this size, and neither do we: not trained here. What to expect is bounded from above by OpenAI's own
weights on OpenWebText (configs/eval_gpt2_xl.py). The learning rate is GPT-3's for this size (Brown et al. 2020,
table 2.1).
"""

from ml_collections import config_dict

from train import TrainConfig


def get_config() -> config_dict.ConfigDict:
    return config_dict.ConfigDict(
        TrainConfig(
            out_dir="out-gpt2-xl",
            dataset="openwebtext",
            n_layer=48,
            n_head=25,
            n_embd=1600,
            batch_size=1,
            block_size=1024,
            gradient_accumulation_steps=480,
            max_iters=600_000,
            lr_decay_iters=600_000,
            learning_rate=2e-4,
            min_lr=2e-5,
            eval_interval=1000,
            eval_iters=200,
            log_interval=10,
            weight_decay=1e-1,
        ).to_dict()
    )
