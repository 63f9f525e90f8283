"""Computes one vector for each text by a frozen text encoder, and caches it on disk."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tokenizers import Tokenizer
from torch.nn import functional as F

from flip_hf.checkpoint.processor_check import load_tokenizer
from flip_hf.checkpoint.weights_check import find_weights
from flip_hf.configuration_flip import FlipConfig, first_layers
from flip_hf.data.files import content_hash
from flip_hf.data.text_features import TextFeatures, text_key
from flip_hf.encoder_files import VECTOR_POOLING, EncoderFiles
from flip_hf.fetch import FetchError, cache_dir, resolve_pretrained
from flip_hf.nn.precision import computes_bf16
from flip_hf.progress import progress_bar
from flip_hf.standard_json import settings_json
from flip_hf.text_encoder import load_text_encoder
from flip_hf.towers import FlipModel
from flip_hf.vector_cache import VectorCache

# Texts that are sorted by length together; their vectors are written in one transaction.
_TEXTS_AT_ONCE = 8192
# Increase this number when vectors are computed differently; it changes every identity.
_VERSION = 1
# Entries of `config.json` that describe the saved file, not the model.
_NOT_OF_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "auto_map")


class TextVectorizer:
    """Computes one vector for each text by a frozen encoder, and caches it on disk.

    Vectors are computed in batches of texts of similar length, in bfloat16 if the device computes in it, and rounded to
    float16. The last bits of a vector depend on the other texts of its batch. The cache keeps the first vector of a
    text, and every later call returns that one.

    The cache is an SQLite file for each `identity`, in the folder `text-vectors` of `flip_hf.fetch.cache_dir()`. It
    holds hashes of the texts, not the texts. Several processes may use it at once. Interrupted encoding continues where
    it stopped.

    The encoder is one of these:

    - A sentence-transformers model (`modules.json`) with the modules Transformer, Pooling (mean, cls or last token) and
      an optional Normalize. The vectors are those of sentence-transformers.
    - A saved FLIP model with its processor. Its text tower reads texts with the processor's tokenizer, and pools
      according to `text_pooling`.
    - A plain transformers encoder. The vector is the mean over its token states.

    The weights are loaded, from safetensors only, when a text is not in the cache. Custom code of an encoder never
    runs.

    Args:
        encoder: a folder, or the name of a repository in the local Hub cache. Nothing is downloaded.
        text_layers: number of layers of the encoder to use, counted from the first; all by default.
        pooling: `"mean"` over the tokens, `"cls"` for the first token's state, or `"last"` for the last one's; by
            default the pooling in the encoder's files.
        normalize: whether to scale vectors to an L2 norm of 1; by default as a sentence-transformers model's files say,
            and true for other encoders.
        batch_size: texts in a batch.
        max_length: maximum number of tokens of a text, including special tokens; the rest is cut off. By default the
            length in a sentence-transformers model's files, and 256 for other encoders. It never exceeds the
            tokenizer's limit.

    Attributes:
        size: numbers in a vector.
        pooling: the pooling in use.
        normalize: whether vectors are normalised.

    Raises:
        ValueError: a setting is invalid, or the encoder's files describe none of the encoders above.
        flip_hf.fetch.FetchError: the encoder is not on this machine.
    """

    def __init__(
        self,
        encoder: str | Path,
        *,
        text_layers: int | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"TextVectorizer: {name}={value} must be at least 1")
        if pooling is not None and pooling not in VECTOR_POOLING:
            raise ValueError(f"TextVectorizer: pooling={pooling!r} is not one of {', '.join(VECTOR_POOLING)}")
        self.encoder = str(encoder)
        self.batch_size = batch_size
        self._files = EncoderFiles.of(_local_folder(self.encoder))
        self._text_config = self._files.text_config
        if text_layers is not None:
            first_layers(self._text_config, text_layers)
        self._max_length = max_length
        self.pooling = pooling or self._files.pooling
        self.normalize = self._files.normalize if normalize is None else normalize
        self.size: int = self._text_config.hidden_size

    def __getstate__(self) -> dict[str, Any]:
        # Another process loads the weights itself, onto its own device, and only if it needs them.
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"}

    @cached_property
    def max_length(self) -> int:
        """Maximum number of tokens of a text, including special tokens."""
        allowed = [self._tokenizer.model_max_length, getattr(self._text_config, "max_position_embeddings", None)]
        # Encoders without position embeddings have no limit, or a value that is not a length.
        most = min(n for n in allowed if n is not None and n > 0)
        wanted = self._max_length or self._files.max_length
        return int(most if wanted is None else min(wanted, most))

    @cached_property
    def identity(self) -> str:
        """A fingerprint, 32 hexadecimal digits, of everything that determines a vector.

        It covers the contents of the encoder's weights, its configuration and tokenizer, the layers in use, pooling,
        normalisation, `max_length` and lower-casing. It does not cover the encoder's name and folder, the device and
        the batch size.

        Raises:
            OSError: there are no safetensors files.
            ValueError: the weights or the tokenizer can't be read.
        """
        files = self._files
        facts = {
            "version": _VERSION,
            "weights": [content_hash(path) for path in find_weights(str(files.folder), {}).files],
            "config": {k: v for k, v in files.saved_config.items() if k not in _NOT_OF_THE_MODEL},
            "tokenizer": _without_lengths(self._tokenizer).to_str(),
            "layers": self._text_config.num_hidden_layers,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "lower_case": files.lower_case,
        }
        return xxhash.xxh3_128_hexdigest(settings_json(facts, sort_keys=True).encode())

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of some texts, float16 (texts, size), in their order. Repeated texts are encoded once.

        Raises:
            ValueError: a text is not a string, or its vector is not finite.
            OSError: the cache is damaged, or can't be written.
        """
        keys = _keys(texts)
        vectors = np.empty((len(keys), self.size), np.float16)
        if not len(keys):
            return vectors
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        with self._cache() as cache:
            missing = np.sort(cache.read(keys, vectors, first))
            is_short = len(missing) <= self.batch_size
            with progress_bar(total=len(missing), desc="encoding texts", leave=False, disable=is_short) as bar:
                for start in range(0, len(missing), _TEXTS_AT_ONCE):
                    part = missing[start : start + _TEXTS_AT_ONCE]
                    # Reads again, because another process may have encoded them since.
                    new = cache.read(keys, vectors, part)
                    bar.update(len(part) - len(new))
                    if len(new):
                        cache.add(keys[new], self._encode([texts[i] for i in new.tolist()], bar.update))
                        # If another process has added a vector first, that one stays; later calls return it, too.
                        cache.read(keys, vectors, new)
        source = first[inverse]
        repeated = np.flatnonzero(source != np.arange(len(source)))
        vectors[repeated] = vectors[source[repeated]]
        return vectors

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Looks up the vectors of texts that were encoded before, by their keys.

        Args:
            keys: int64 (texts,), from `flip_hf.data.text_features.text_key`.

        Returns:
            float16 (texts, size).

        Raises:
            OSError: a key is not in the cache, or the cache can't be read.
        """
        distinct, inverse = np.unique(keys, return_inverse=True)
        vectors = np.empty((len(distinct), self.size), np.float16)
        with self._cache() as cache:
            if number := len(cache.read(distinct, vectors, np.arange(len(distinct)))):
                raise OSError(
                    f"{self._cache_path}: the vectors of {number} texts are no longer in the cache; encode their rows "
                    "again"
                )
        return vectors[inverse]

    @property
    def _cache_path(self) -> Path:
        return cache_dir() / "text-vectors" / f"{self.identity}.sqlite3"

    def _cache(self) -> VectorCache:
        return VectorCache(self._cache_path, self.size)

    def _encode(self, texts: list[str], done: Callable[[int], object]) -> np.ndarray:
        """Computes the vectors of texts, float16 (texts, size); calls `done` with the size of each batch."""
        tokens = self._tokenize(texts)
        lengths = np.array([len(ids) for ids in tokens])
        # Longest first, so that running out of memory shows in the first batch.
        order = np.argsort(-lengths, kind="stable")
        vectors = np.empty((len(texts), self.size), np.float16)
        encoder, device, pool = self._encoder, self._encoder.device, VECTOR_POOLING[self.pooling]
        padding = self._tokenizer.pad_token_id or 0
        # One context for all batches, because it caches the weights that it has rounded.
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16()):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                mask = np.arange(lengths[rows[0]]) < lengths[rows, None]
                ids = np.full(mask.shape, padding)
                ids[mask] = np.concatenate([tokens[row] for row in rows])
                attention = torch.from_numpy(mask.astype(np.int64)).to(device)
                output = encoder(input_ids=torch.from_numpy(ids).to(device), attention_mask=attention)
                pooled = pool(output.last_hidden_state.float(), attention)
                pooled = F.normalize(pooled, dim=1) if self.normalize else pooled
                vectors[rows] = pooled.half().cpu().numpy()
                done(len(rows))
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            shown = texts[int(np.flatnonzero(~finite)[0])]
            raise ValueError(
                f"{self.encoder}: the vector of the text {shown!r:.80} has numbers that float16 can't hold; normalize "
                "the vectors, or check the encoder's weights"
            )
        return vectors

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if self._files.lower_case:
            texts = [text.lower() for text in texts]
        # A text without tokens becomes a single padding token, because an encoder needs some input.
        nothing = [self._tokenizer.pad_token_id or 0]
        return [encoded.ids or nothing for encoded in self._backend.encode_batch_fast(texts)]

    @cached_property
    def _tokenizer(self) -> Any:
        # If the tokenizer's own files do not name its class, the configuration does.
        files = self._files
        config = FlipConfig() if files.flip_config is not None else files.text_config
        tokenizer = load_tokenizer(str(files.folder), {}, {}, config)
        if not tokenizer.is_fast:
            raise ValueError(f"{self.encoder}: {type(tokenizer).__name__} is not a fast tokenizer")
        return tokenizer

    @cached_property
    def _backend(self) -> Tokenizer:
        """The tokenizers backend, which is faster than calling the transformers tokenizer around it."""
        backend = _without_lengths(self._tokenizer)
        backend.enable_truncation(self.max_length, direction=self._tokenizer.truncation_side)
        return backend

    @cached_property
    def _encoder(self) -> Any:
        folder = str(self._files.folder)
        # Without it, a half-precision file would make every layer compute in half precision on a CPU.
        settings: dict[str, Any] = {"dtype": torch.float32}
        if (config := self._files.flip_config) is not None:
            encoder = FlipModel.from_pretrained(folder, config=config, **settings).text_model
        else:
            encoder = load_text_encoder(folder, self._text_config, **settings)
        # Decoders would otherwise keep keys and values for generation.
        encoder.config.use_cache = False
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return encoder.eval().to(accelerator or "cpu")


def _local_folder(encoder: str) -> Path:
    path = Path(resolve_pretrained(encoder))
    if not path.is_dir():
        raise FetchError(f"the text encoder {encoder!r} is on the Hub; fetch it with `hf download {encoder}`")
    return path


def _without_lengths(tokenizer: Any) -> Tokenizer:
    """Copies a tokenizer without truncation and padding, which a saved one may do and calls may change."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _keys(texts: Sequence[str]) -> np.ndarray:
    """The keys of texts, int64 (texts,)."""
    if isinstance(texts, str):
        raise ValueError(f"the text {texts!r:.80} is not in a list; pass a list of texts")
    keys = np.empty(len(texts), np.int64)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is {text!r:.80}, not a string; fill it in, or leave it out")
        try:
            keys[i] = text_key(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"text {i}, {text!r:.80}, is not valid Unicode ({error.reason})") from error
    return keys


def make_source(features: TextFeatures) -> TextVectorizer:
    """Creates the encoder of some text features."""
    assert features.encoder is not None
    return TextVectorizer(features.encoder, text_layers=features.text_layers)
