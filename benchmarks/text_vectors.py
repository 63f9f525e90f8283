"""Times the vectors of texts: computed, read from the cache, and computed by a plain loop.

python benchmarks/text_vectors.py
python benchmarks/text_vectors.py --texts 1000000

The texts are distinct film titles with a year and genres. Each row of the table is measured in its own process, which
loads the encoder before the timing starts. The plain loop is that of the encoder's model card: transformers, texts in
their order in batches of 32, padded to the longest text of each batch, in single precision.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ceilings import CPU, measure_ceilings
from shared import machine, markdown
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from flip_hf.fetch import MINILM, minilm, resolve_pretrained
from flip_hf.standard_json import measures_json
from flip_hf.text_vectors import TextVectorizer

ADJECTIVES = ("Silent", "Last", "Golden", "Broken", "Secret", "Lonely", "Distant", "Crimson", "Hidden", "Endless")
NOUNS = ("River", "Winter", "Garden", "Stranger", "Promise", "Mountain", "Letter", "Ocean", "Mirror", "Highway")
PLACES = ("Ohio", "Paris", "Tomorrow", "Babylon", "Lisbon", "Montana", "Shanghai", "Avalon", "Havana", "Siberia")
GENRES = ("Drama", "Comedy", "War", "Romance", "Thriller", "Western", "Musical", "Horror", "Crime", "Fantasy")
YEARS = range(1920, 2000)


def make_texts(number: int) -> list[str]:
    """Distinct texts in an irregular order, such as `The Silent River of Ohio (1987), Drama, War`."""
    genres = [", ".join(chosen) for size in (1, 2, 3) for chosen in itertools.combinations(GENRES, size)]
    sizes = [len(ADJECTIVES), len(NOUNS), len(PLACES), len(YEARS), len(genres)]
    possible = int(np.prod(sizes))
    # A step that is coprime to their number visits each text once.
    step = next(n for n in itertools.count(possible // 3) if np.gcd(n, possible) == 1)
    places = np.unravel_index(np.arange(number) * step % possible, sizes)
    return [
        f"The {ADJECTIVES[a]} {NOUNS[n]} of {PLACES[p]} ({YEARS[y]}), {genres[g]}"
        for a, n, p, y, g in zip(*(each.tolist() for each in places), strict=True)
    ]


class PlainLoop:
    """The loop of an encoder's model card."""

    def __init__(self, encoder: str) -> None:
        path = resolve_pretrained(encoder)
        # The caller chooses the encoder.
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)  # nosec B615
        self.model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).eval()  # nosec B615
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), 32):
            inputs = self.tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            states = self.model(**inputs).last_hidden_state
            vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu().numpy())
        return np.concatenate(vectors)


def measure(step: str, encoder: str, texts: list[str]) -> dict[str, float]:
    """Measures one row of the table; the cache is in the environment's folder."""
    call = PlainLoop(encoder) if step == "plain loop" else TextVectorizer(encoder)
    # Loads what the step needs, which for reading from the cache is no encoder.
    call(["a text"])
    started = time.perf_counter()
    vectors = call(texts)
    seconds = time.perf_counter() - started
    # Linux counts in KiB.
    facts = {"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if step == "plain loop":
        cached = TextVectorizer(encoder)(texts).astype(np.float32)
        facts["lowest_cosine"] = float((cached * vectors).sum(axis=1).min())
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--plain_texts", type=int, default=1024, help="number of texts for the plain loop")
    parser.add_argument("--encoder", default=MINILM)
    parser.add_argument("--measure", help="internal: measure one row in this process")
    arguments = parser.parse_args()
    number = {"plain loop": min(arguments.plain_texts, arguments.texts)}
    if arguments.measure:
        texts = make_texts(number.get(arguments.measure, arguments.texts))
        print(measures_json(measure(arguments.measure, arguments.encoder, texts)))
        return
    if arguments.encoder == MINILM:
        minilm()
    table, lowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for step in ("computed", "from the cache", "plain loop"):
            # Runs this program again.
            done = subprocess.run(  # nosec B603
                [sys.executable, __file__, *sys.argv[1:], "--measure", step],
                env={**os.environ, "FLIP_HF_CACHE": folder},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            facts, texts = json.loads(done.stdout.splitlines()[-1]), number.get(step, arguments.texts)
            print(measures_json({"benchmark": "text_vectors", "step": step, "texts": texts, **facts}))
            lowest = facts.get("lowest_cosine", lowest)
            rate, peak = f"{texts / facts['seconds']:,.0f}", f"{facts['peak_gib']:.2f}"
            table.append([step, f"{texts:,}", f"{facts['seconds']:,.2f}", rate, peak])
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*"))
    print(f"\n{markdown(['vectors', 'texts', 'seconds', 'texts/s', 'peak memory, GiB'], table)}\n")
    print(f"The cache takes {disk / 2**20:,.1f} MiB, {disk / (arguments.texts + 1):,.0f} bytes per text.")
    print(f"The lowest cosine similarity to the plain loop's vectors is {lowest:.5f}.\n")
    print(f"{measure_ceilings(CPU)}\n\n{machine()}")


if __name__ == "__main__":
    main()
