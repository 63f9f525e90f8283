"""FlipProcessor: turns rows of a click log into both views."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import torch
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import PROCESSOR_NAME, cached_file

from flip_hf.checkpoint.loading_file import PROCESSOR_AUTO_MAP, write_loading_file
from flip_hf.checkpoint.processor_check import (
    HUB_SETTINGS,
    check_loading_settings,
    load_tokenizer,
    read_processor_settings,
)
from flip_hf.configuration_flip import FlipConfig
from flip_hf.data.csv_files import CSVFormat
from flip_hf.data.dataset_encoding import encode_dataset
from flip_hf.data.encoded_rows import padded_views
from flip_hf.data.feature_vectors import VECTORS_NAME, FeatureVectors
from flip_hf.data.files import is_place, shown
from flip_hf.data.ragged import padding_multiple
from flip_hf.data.row_batches import contents_of, value_batches
from flip_hf.data.row_encoding import encode_rows
from flip_hf.data.schema import InputError
from flip_hf.data.tables import to_table
from flip_hf.data.template import TextTemplate
from flip_hf.data.text_features import TextFeatures, as_text_features, with_columns
from flip_hf.data.vector_fitting import VectorFitting, fit_fields
from flip_hf.data.vector_inputs import VectorInputs
from flip_hf.data.vocabulary import FeatureVocabulary
from flip_hf.fetch import resolve_pretrained
from flip_hf.field_checks import check_label
from flip_hf.fields import FieldConfig, as_fields, tabular_fields, text_fields, vector_sizes
from flip_hf.grown_texts import texts_of_grown
from flip_hf.growth import FeatureGrowth
from flip_hf.hub import push_to_hub
from flip_hf.standard_json import settings_json
from flip_hf.text_vectors import make_source

VOCABULARY_NAME = "vocabulary.parquet"
_LONGEST_TEXT = 512


class FlipProcessor(ProcessorMixin):
    """Turns rows into `feature_ids` (tabular view) and `input_ids` (textual view).

    Create one with `FlipProcessor.fit(...)` or `FlipProcessor.from_pretrained(...)`.

    Args:
        tokenizer: the text encoder's fast tokenizer.
        vocabulary: the fitted features.
        label: name of the label column (0 or 1), if the log has one.
        max_length: maximum number of tokens of a row's text, including special tokens.
        vectors: the vectors of vector fields and text features, if there are any.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        vocabulary: FeatureVocabulary | None = None,
        label: str | None = None,
        max_length: int = _LONGEST_TEXT,
        vectors: FeatureVectors | None = None,
    ) -> None:
        super().__init__(tokenizer)
        if vocabulary is None:
            raise ValueError("create a processor with FlipProcessor.fit or FlipProcessor.from_pretrained")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, and FLIP needs one")
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no padding token; set tokenizer.pad_token")
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
            raise ValueError(f"max_length={max_length!r} must be a whole number of at least 1")
        self.vocabulary = vocabulary
        self.label = label
        self.max_length = max_length
        self.vectors = FeatureVectors([], {}, {}, make_source) if vectors is None else vectors
        if lacking := sorted(set(vector_sizes(vocabulary.fields)) - set(self.vectors.scales)):
            raise ValueError(f"field {lacking[0]!r} has vectors, but the processor has no fitted vectors for it")
        self.has_loading_code = False
        self.template = TextTemplate(tokenizer, vocabulary.fields, max_length)

    @property
    def fields(self) -> list[FieldConfig]:
        """The fitted fields, in the order of the text. `feature_ids` has the same order, without text fields."""
        return self.vocabulary.fields

    @property
    def feature_counts(self) -> torch.Tensor:
        """int64 (features,): how often fitting saw each feature."""
        return torch.from_numpy(self.vocabulary.counts)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the arrays that calling the processor returns."""
        # input_ids come first, because Trainer groups rows by the length of the first one.
        return ["input_ids", "attention_mask", "feature_ids"]

    def columns_read(self, with_label: bool = False, group_field: str | None = None) -> list[str]:
        """Names of the columns of raw rows that encoding reads."""
        label = self._label_name() if with_label else None
        names = [f.name for f in self._fields_read]
        check_label(self.label, names, group_field)
        return list(dict.fromkeys([*names, *(name for name in (label, group_field) if name is not None)]))

    @property
    def _fields_read(self) -> list[FieldConfig]:
        """The fields, and the columns that text features are made from, as fields."""
        return with_columns(self.fields, self.vectors.features.values())

    @classmethod
    def fit(
        cls,
        dataset: Any,
        fields: Sequence[FieldConfig | str],
        tokenizer: Any,
        label: str | None = None,
        max_length: int | None = None,
        source: str | None = None,
        csv: CSVFormat | None = None,
        text_features: Sequence[TextFeatures | Mapping[str, Any]] = (),
        catalog: Any = None,
    ) -> Self:
        """Fits a processor: learns which values each field has. Fit on training rows only.

        Args:
            dataset: rows in any form that `encode` takes; a `datasets.IterableDataset`; or CSV or Parquet files, named
                by a path, folder, pattern or URL, or a list of these. The last two forms are read as a stream.
            fields: the fields, in the order of the text.
            tokenizer: a fast tokenizer, or the name or folder of one.
            label: name of the label column.
            max_length: maximum number of tokens of a row's text; by default the tokenizer's limit, but at most 512.
            source: where the rows come from, for error messages; by default the path, if `dataset` is one.
            csv: the format of CSV files.
            text_features: vectors to attach to the values of fields, such as `[TextFeatures("movie_id",
                encoder="sentence-transformers/all-MiniLM-L6-v2", fields=["title", "genre"])]`.
            catalog: further rows in the same forms as `dataset`; they need only the columns of the text features.
                Values in these rows get vectors too, even if no training row has them. A later history may hold such
                values.

        Raises:
            InputError: a column is missing, a value can't be an id, or there are no rows.
            flip_hf.fetch.FetchError: an encoder was not found.
        """
        if isinstance(tokenizer, str | Path):
            # To choose a revision, pass a loaded tokenizer.
            path = resolve_pretrained(str(tokenizer), "tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # nosec B615
        unfitted = as_fields(fields)
        if is_place(dataset):
            source = source or shown(dataset)
        if not unfitted:
            raise ValueError("a processor needs at least one field: fields=[FieldConfig('user_id'), ...]")
        features = as_text_features(text_features, unfitted)
        check_label(label, [f.name for f in with_columns(unfitted, features)])
        if not tabular_fields(unfitted):
            raise ValueError("at least one field must have ids, but all of these are of kind='text'")
        if not text_fields(unfitted):
            raise ValueError("at least one field must have a text, but all of these are of kind='vector'")
        read = partial(value_batches, label=label, csv=csv)
        vocabulary, vectors = fit_fields(read, dataset, source, unfitted, features, catalog, make_source)
        if max_length is None:
            max_length = min(tokenizer.model_max_length, _LONGEST_TEXT)
        return cls(tokenizer, vocabulary, label, max_length, vectors)

    def extend(self, dataset: Any, source: str | None = None, csv: CSVFormat | None = None) -> FeatureGrowth:
        """Adds features for values that fitting did not see, behind all existing features.

        Existing ids don't change. Numbers and hashed values have their buckets already, so their fields do not grow. A
        value that occurs fewer than `min_count` times in these rows stays OOV.

        Args:
            dataset: rows as in `fit`, without those that the processor was fitted on.
            source: where the rows come from, for error messages.
            csv: the format of CSV files.

        Returns:
            The growth, for `model.resize_feature_embeddings`.

        Raises:
            InputError: as in `fit`.
        """
        if is_place(dataset):
            source = source or shown(dataset)
        fitting = VectorFitting([], list(self.vectors.features.values()))
        batches = value_batches(dataset, self._fields_read, self.label, source, csv)
        self.vocabulary = self.vocabulary.extended(fitting.watch(batches))
        self.vectors = fitting.extended(self.vocabulary, self.vectors)
        texts = partial(texts_of_grown, self.vocabulary, self.tokenizer, self.max_length)
        return FeatureGrowth(list(self.fields), self.feature_counts, texts)

    def set_text_encoder(self, field: str, encoder: str | Path) -> None:
        """Sets the location of the encoder that encodes new texts of a field's text features.

        Args:
            field: the field's name.
            encoder: a folder, or a name as in `TextFeatures`. It must hold the same encoder that `fit` used.
        """
        self.vectors.set_encoder(field, str(encoder))

    def select_columns(
        self,
        rows: Any,
        *,
        first_row: int = 0,
        with_label: bool = False,
        source: str | None = None,
        group_field: str | None = None,
    ) -> pa.Table:
        """Selects the fields' columns of rows in any form; arguments and errors as in `encode`."""
        # The label column may be there even if it is not asked for.
        return to_table(
            rows,
            self.columns_read(with_label, group_field),
            optional=[self.label] if self.label and not with_label else [],
            contents=contents_of(self._fields_read),
            first_row=first_row,
            source=source,
        )

    def encode(
        self,
        rows: Any,
        *,
        first_row: int = 0,
        with_label: bool = False,
        with_text: bool = True,
        with_vectors: bool = True,
        source: str | None = None,
        group_field: str | None = None,
    ) -> pa.Table:
        """Encodes rows into both views, without padding.

        Args:
            rows: a list of dicts, a dict of columns, a pandas, Arrow or polars table, any other object that exports
                Arrow data by `__arrow_c_stream__` or `__arrow_c_array__`, or a `datasets.Dataset`.
            first_row: number of the first row, for error messages and masks.
            with_label: whether to read the label column.
            with_text: whether to build the textual view. The ID-based model alone does not read it.
            with_vectors: whether to look up the vectors. The text encoder alone does not read them.
            source: where the rows come from, for error messages.
            group_field: a column whose values group the rows, such as users, for metrics within a group (GAUC, UAUC).
                It need not be a field. It is read as an id, whatever the kind of the field.

        Returns:
            A table of the same rows. `row` int64 is the row's number. `feature_ids` int64 [P] has one position for each
            field with features, or `max_values` positions, padded, for a field with several values. `fallbacks` uint8
            [fields]: flags of `Fallback`. With text features, `vector_keys` int64: for each position of a field with
            text features, the key of its vector, or 0 if it has none. With vector fields, `vectors` float32:
            concatenated, standardised, NaN if missing. With `with_text`, `input_ids` int32 [tokens], and
            `token_field_ids` int16 [tokens]: the index of the field on tokens of its value, -1 elsewhere. With
            `with_label`, `label` float32. With `group_field`, `group` int64: a number that rows with the same value
            share, -1 if it is missing.

        Raises:
            InputError: a column is missing, or a value can't be an id or a label.
            ValueError: the processor has no label, or `group_field` is the label.
        """
        label = self._label_name() if with_label else None
        table = self.select_columns(
            rows, first_row=first_row, with_label=with_label, source=source, group_field=group_field
        )
        return encode_rows(
            table,
            self.vocabulary,
            self.template,
            self.vectors,
            label=label,
            with_text=with_text,
            with_vectors=with_vectors,
            group_field=group_field,
            first_row=first_row,
            source=source,
        )

    def encode_dataset(
        self,
        dataset: Any,
        *,
        with_label: bool | None = None,
        source: str | None = None,
        csv: CSVFormat | None = None,
        group_field: str | None = None,
    ) -> Any:
        """Encodes a whole dataset in batches; datasets caches the result if the dataset is on disk.

        Uses as many threads as torch, at most 8. Logs how often each field fell back. Warns of fields whose values are
        unseen or missing in a far larger share of the rows than in fitting, and gives an example.

        Args:
            dataset: rows in any form that `fit` takes. A `datasets.IterableDataset` stays lazy; each split of a
                `datasets.DatasetDict` is encoded. Columns that are not fields are dropped.
            with_label: whether to read the label column; by default true if the processor has a label.
            source: where the rows come from, for error messages.
            csv: the format of CSV files.
            group_field: as in `encode`.

        Returns:
            A `datasets.Dataset` with the columns of `encode`. A DatasetDict gives a DatasetDict, an IterableDataset an
            IterableDataset. If several processes read a stream, each numbers its own rows.

        Raises:
            InputError: as in `encode`, or there are no rows. For a stream it is raised during reading.
        """
        with_label = self.label is not None if with_label is None else with_label
        return encode_dataset(self, dataset, with_label=with_label, source=source, csv=csv, group_field=group_field)

    def __call__(
        self, rows: Any, return_tensors: str | None = None, pad_to_multiple_of: int | None = None
    ) -> BatchFeature:
        """Encodes and pads rows into the inputs of `FlipForCTR`.

        Args:
            rows: as in `encode`.
            return_tensors: "pt", "np", or None for lists.
            pad_to_multiple_of: the text is padded to the longest row's length, rounded up to a multiple of this; by
                default of `flip_hf.data.ragged.padding_multiple()`, which is 8 with an accelerator and 2 without.

        Returns:
            `feature_ids` int64 (B, P), `input_ids` and `attention_mask` int64 (B, T); if fields have vectors also
            `vectors` and `vector_places`, as in `FlipModel`.
        """
        multiple = padding_multiple() if pad_to_multiple_of is None else pad_to_multiple_of
        encoded = self.encode(rows)
        views = padded_views(encoded, self.tokenizer.pad_token_id, multiple)
        plain = views if return_tensors else {name: view.tolist() for name, view in views.items()}
        inputs = BatchFeature(plain, tensor_type=return_tensors)
        inputs.update(VectorInputs(self.fields, self.vectors).of_type(encoded, return_tensors))
        return inputs

    def content_hash(self) -> str:
        """Returns a hash of everything that affects how a row is encoded."""
        digest = hashlib.sha256(settings_json(self.to_dict(), sort_keys=True).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        sink = pa.BufferOutputStream()
        table = self.vocabulary.to_table()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
        for name, tensor in self.vectors.tensors().items():
            digest.update(name.encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The settings that are not in the files of the tokenizer and the vocabulary."""
        settings = {
            "processor_class": type(self).__name__,
            "fields": [f.to_dict() for f in self.fields],
            "label": self.label,
            "max_length": self.max_length,
        }
        features = [own.to_dict() for own in self.vectors.features.values()]
        return settings | ({"text_features": features} if features else {})

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Saves the processor to a folder. Also saves the code for `trust_remote_code` if it was loaded with it.

        The files are the tokenizer's, `processor_config.json`, `vocabulary.parquet` and, if there are any vectors,
        `vectors.safetensors`.

        Args:
            save_directory: folder to write to; created if it is missing.
            push_to_hub: must be False; `processor.push_to_hub(repo_id)` pushes.
            kwargs: ignored; accepted because transformers passes them.
        """
        if push_to_hub:
            raise ValueError("save_pretrained writes to a folder; push with processor.push_to_hub(repo_id)")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer._set_processor_class(type(self).__name__)
        files = list(self.tokenizer.save_pretrained(folder))
        self.vocabulary.save(folder / VOCABULARY_NAME)
        if self.vectors.scales:
            self.vectors.save(folder / VECTORS_NAME)
            files.append(str(folder / VECTORS_NAME))
        else:
            (folder / VECTORS_NAME).unlink(missing_ok=True)
        settings = self.to_dict()
        if self.has_loading_code:
            settings["auto_map"] = PROCESSOR_AUTO_MAP
            files.append(str(write_loading_file(folder)))
        (folder / PROCESSOR_NAME).write_text(settings_json(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return [*files, str(folder / VOCABULARY_NAME), str(folder / PROCESSOR_NAME)]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Pushes the processor's files and the loading code in one commit; keeps a model's files in the repository.

        `model.push_to_hub(repo_id, processor=processor)` pushes both in one commit.

        Args:
            repo_id: name of the repository, such as `org/name`.
            kwargs: as in `flip_hf.hub.push_to_hub`: `private`, `revision`, `token`, `commit_message` and more.

        Returns:
            The commit's hash.

        Raises:
            ValueError, OSError: as in `flip_hf.hub.push_to_hub`.
        """
        return push_to_hub(repo_id, processor=self, **{"commit_message": "Push a FLIP processor"} | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """Loads a processor that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a local folder or a repository's name.
            kwargs: `max_length`, which replaces the saved one; `revision`, `token`, `cache_dir`, `local_files_only` and
                others, as in transformers; and the tokenizer's settings, such as `sep_token`.

        Raises:
            InputError: the files contradict each other, or can't be read.
            OSError: the folder or repository lacks a file.
            ValueError: a setting is unknown; `max_length` is not a whole number, or is too small for one token of each
                field.
        """
        name = str(pretrained_model_name_or_path)
        hub = {k: v for k, v in kwargs.items() if k in HUB_SETTINGS}
        settings_file = str(cached_file(name, PROCESSOR_NAME, **hub))
        vocabulary_file = str(cached_file(name, VOCABULARY_NAME, **hub))
        saved = read_processor_settings(settings_file, {cls.__name__, FlipProcessor.__name__})
        vocabulary = FeatureVocabulary.load(vocabulary_file, saved.fields)
        vectors = None
        if vector_sizes(saved.fields):
            vectors_file = str(cached_file(name, VECTORS_NAME, **hub))
            vectors = FeatureVectors.load(vectors_file, vocabulary, saved.text_features, make_source)
        given = kwargs.pop("max_length", None)
        tokenizer = load_tokenizer(name, hub, kwargs, FlipConfig())
        check_loading_settings(kwargs, tokenizer)
        try:
            processor = cls(tokenizer, vocabulary, saved.label, saved.max_length, vectors)
        # For a malformed tokenizer, tokenizers raises errors of any type.
        except Exception as error:
            raise InputError(f"not a FLIP processor's files: {error}", source=name) from error
        if given is not None:
            processor = cls(tokenizer, vocabulary, saved.label, given, vectors)
        processor.has_loading_code = saved.has_loading_code
        return processor

    def _label_name(self) -> str:
        if self.label is None:
            raise ValueError("this processor was fitted without a label column: FlipProcessor.fit(..., label='label')")
        return self.label
