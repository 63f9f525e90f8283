"""Vectors of text towers, each computed once: for serving without the text encoder, and for an index."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flip_hf.data.collators import FlipCTRCollator
from flip_hf.data.row_batches import BATCH_ROWS, contents_of
from flip_hf.data.row_encoding import encode_text
from flip_hf.data.tables import to_table
from flip_hf.modeling_flip import FlipForCTR
from flip_hf.processing_flip import FlipProcessor
from flip_hf.text_towers import place_of_tower

_SAMPLED_NUMBERS = 64


def can_encode_apart(model: FlipForCTR) -> bool:
    """Whether a model has text towers and its text encoder is on one device.

    Otherwise accelerate brings weights and inputs together only during the model's own forward.
    """
    if model.config.text_towers is None or model.config.mode == "id":
        return False
    devices = {parameter.device for parameter in model.flip.text_model.parameters()}
    return len(devices) == 1 and torch.device("meta") not in devices


class TowerVectors:
    """Computes the vectors of the texts that a model's towers read, and keeps the most recently used in memory.

    A text is identified by its token ids, so all rows with the same text of a user or an item share one vector. The
    object is thread-safe.

    Args:
        model: a `FlipForCTR` for which `can_encode_apart` is true. Encoding switches it to evaluation mode.
        processor: the model's processor.
        max_texts: maximum number of texts whose vectors are kept, at 4 bytes per number; 0 keeps none.
    """

    def __init__(self, model: FlipForCTR, processor: FlipProcessor, max_texts: int) -> None:
        self.max_texts = max_texts
        self._model = model
        self._processor = processor
        self._collator = FlipCTRCollator(processor, "text", text_towers=model.config.text_towers)
        text_config: Any = model.config.text_config
        self._size: int = text_config.hidden_size
        # Least recently used first. The operating system allocates pages of the array only when they are written.
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._kept = np.empty((max_texts, self._size), np.float32)
        self._versions: list[tuple[int, int]] = []
        self._sample = torch.empty(0)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Another process encodes its texts itself.
        return {"model": self._model, "processor": self._processor, "max_texts": self.max_texts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        """Number of texts whose vectors are kept."""
        return len(self._slots)

    @torch.no_grad()
    def forget_if_changed(self) -> None:
        """Drops all vectors if the weights of the text encoder have changed. Call it before scoring rows."""
        weights = [p.detach() for p in self._model.flip.text_model.parameters()]
        # PyTorch counts the in-place changes of a tensor, except those by fused optimizers and in inference mode. The
        # sample covers these: an optimizer step changes the first numbers of at least one weight.
        versions = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        sample = torch.cat([w.flatten()[:_SAMPLED_NUMBERS] for w in weights]).cpu()
        with self._lock:
            if versions != self._versions or not torch.equal(sample, self._sample):
                self._versions, self._sample = versions, sample
                self._slots.clear()

    @torch.no_grad()
    def of_rows(self, rows: Any, tower: str, batch_size: int) -> np.ndarray:
        """Implements `CTRPredictionPipeline.tower_vectors`; arguments and errors as there."""
        place = place_of_tower(tower, self._model.config)
        names = self._collator.towers[tower] if self._collator.towers is not None else []
        fields = [field for field in self._processor.fields if field.name in names]
        self.forget_if_changed()
        table = to_table(rows, names, contents=contents_of(fields))
        result = np.empty((len(table), self._size), np.float32)
        for start in range(0, len(table), BATCH_ROWS):
            part = table.slice(start, BATCH_ROWS)
            texts = encode_text(part, self._processor.vocabulary, self._processor.template, names, first_row=start)
            batch = self._collator(texts)
            ids, mask = (batch[name][:, place] for name in ("input_ids", "attention_mask"))
            result[start : start + len(part)] = self._find(ids, mask, batch_size)
        return result

    def with_vectors(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replaces the texts of a batch with `tower_vectors`; a batch without texts is returned as it is."""
        if "input_ids" not in batch:
            return batch
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found = self._find(ids.flatten(0, 1), mask.flatten(0, 1), len(ids))
        rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
        return rest | {"tower_vectors": torch.from_numpy(found).unflatten(0, ids.shape[:2])}

    def _find(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, batch_size: int) -> np.ndarray:
        """The vectors of texts, int64 (texts, T) twice -> float32 (texts, C); encodes unknown texts in batches."""
        lengths, multiple = attention_mask.sum(dim=1).numpy(), self._collator.pad_to_multiple_of
        number_of_key: dict[bytes, int] = {}
        numbers = np.empty(len(input_ids), np.int64)
        firsts: list[int] = []
        for i, key in enumerate(_keys(input_ids.numpy(), lengths)):
            numbers[i] = number_of_key.setdefault(key, len(firsts))
            if numbers[i] == len(firsts):
                firsts.append(i)
        keys, rows = list(number_of_key), np.array(firsts, np.int64)
        vectors = np.empty((len(keys), self._size), np.float32)
        new = self._read(keys, vectors)
        # Texts of similar length share a batch.
        for part in _batches(new[np.argsort(lengths[rows[new]], kind="stable")], batch_size):
            length = -(-int(lengths[rows[part]].max()) // multiple) * multiple
            vectors[part] = self._encode(input_ids[rows[part], :length], attention_mask[rows[part], :length])
        self._keep([keys[i] for i in new.tolist()], vectors[new])
        result: np.ndarray = vectors[numbers]
        return result

    def _encode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        if self._model.training:
            # The caller may have trained it between two calls.
            self._model.eval()
        device = self._model.flip.text_model.device
        vectors = self._model.flip.encode_texts(input_ids.to(device), attention_mask.to(device))
        result: np.ndarray = vectors.float().cpu().numpy()
        return result

    def _read(self, keys: Sequence[bytes], vectors: np.ndarray) -> np.ndarray:
        """Copies the kept vectors into an array, and returns the indices of the other keys, int64."""
        with self._lock:
            slots = np.array([self._slots.get(key, -1) for key in keys], np.int64)
            is_kept = slots >= 0
            vectors[is_kept] = self._kept[slots[is_kept]]
            for i in np.flatnonzero(is_kept).tolist():
                self._slots.move_to_end(keys[i])
        return np.flatnonzero(~is_kept)

    def _keep(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        first = max(0, len(keys) - self.max_texts)
        with self._lock:
            for key, vector in zip(keys[first:], vectors[first:], strict=True):
                if key in self._slots:
                    # Another thread has encoded the text in the meantime.
                    continue
                slot = len(self._slots)
                if slot == self.max_texts:
                    _, slot = self._slots.popitem(last=False)
                self._slots[key] = slot
                self._kept[slot] = vector


def _keys(input_ids: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    """The token ids of each text, without padding, as bytes."""
    width = 4 * input_ids.shape[1]
    held = input_ids.astype(np.int32).tobytes()
    return [held[width * i : width * i + 4 * length] for i, length in enumerate(lengths.tolist())]


def _batches(places: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
