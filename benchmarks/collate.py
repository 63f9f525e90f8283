"""Times the creation of pretraining batches: from encoded rows (ours), and by tokenising each batch's sentences.

python benchmarks/collate.py

Both sides make batches of the same MovieLens-100K rows, with fields masked in both views. The other side is a typical
training script: it writes the sentences, tokenises the whole batch with the fast tokenizer, and masks tokens with
transformers' `DataCollatorForLanguageModeling`.
"""

import argparse
import functools
from typing import Any

from ceilings import seconds
from shared import machine, markdown
from transformers import DataCollatorForLanguageModeling

from flip_hf import FlipPretrainingCollator
from flip_hf.fetch import minilm
from flip_hf.runs.build import fit_processor
from flip_hf.runs.data import load_click_log
from flip_hf.runs.settings import DataSettings, ModelSettings
from flip_hf.standard_json import measures_json


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[128, 1024])
    arguments = parser.parse_args()
    log = load_click_log(DataSettings(source="movielens-100k", max_train_rows=16384))
    minilm()
    processor = fit_processor(log, ModelSettings())
    encoded = log.encode(processor, "train", with_label=False).with_format("arrow")
    ours, theirs = FlipPretrainingCollator(processor), DataCollatorForLanguageModeling(processor.tokenizer)
    fields = processor.fields

    def assembled(numbers: Any) -> Any:
        return ours(encoded[numbers])

    def tokenised(numbers: Any) -> Any:
        rows = log.splits["train"].select(numbers).to_list()
        texts = [" ".join(f"{f.display_name} is {row[f.name]} ." for f in fields) for row in rows]
        tokens = processor.tokenizer(texts, truncation=True, max_length=processor.max_length)["input_ids"]
        return theirs([{"input_ids": each} for each in tokens])

    table = []
    for size in arguments.batch_sizes:
        numbers = list(range(size))
        times = [seconds(functools.partial(side, numbers)) for side in (assembled, tokenised)]
        facts = {"benchmark": "collate", "batch_size": size, "assembled_s": times[0], "tokenised_s": times[1]}
        print(measures_json(facts))
        per_row = [f"{1e6 * each / size:.1f}" for each in times]
        table.append([size, *per_row, f"{times[1] / times[0]:.1f}"])
    header = ["rows per batch", "µs/row, assembled", "µs/row, tokenised", "speed-up"]
    print(f"\n{markdown(header, table)}\n\n{machine()}")


if __name__ == "__main__":
    main()
