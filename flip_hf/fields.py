"""Fields, and the id space that their features share. Imports no torch."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

PADDING_ID = 0
"""Feature id of padding; its embedding is zero."""
MASK_ID = 1
"""Feature id that replaces a masked feature in the tabular view."""
IGNORED_LABEL = -100
"""Label of a position that was not masked."""
NUM_SHARED_FEATURES = 2
"""Rows at the start of the feature table that belong to no field: padding and mask."""
OOV_OFFSET = 0
"""Offset of a field's out-of-vocabulary (OOV) feature within the field's range."""
MISSING_OFFSET = 1
"""Offset of a field's MISSING feature within the field's range."""
NUM_RESERVED_FEATURES = 2
"""Features at the start of each field's range that stand for no value: OOV and MISSING."""

MOST_FIELDS = 2048
"""Maximum number of fields. A text with more would have no room for their names."""
MOST_POSITIONS = 16_384
"""Maximum number of columns of `feature_ids`. The whole width is read for every row, whatever the row holds."""
MOST_EXTENSIONS = 4096
"""Maximum number of extensions of a field."""
LARGEST_VECTOR = 65_536
"""Maximum size of a vector."""

MODES = ("joint", "id", "text")
"""Views that a model reads: both, the tabular one, or the textual one."""
BUCKETINGS = ("quantile", "log")


@dataclass(frozen=True)
class FieldKindTraits:
    """Properties of a kind of field that the models need; `flip_hf.data.kinds` reads the values.

    Args:
        settings: the kind-specific settings of `FieldConfig` that this kind has.
        has_features: whether the tabular view contains it.
        is_bag: whether a row holds any number of values.
        has_text: whether the text contains it.
        is_vector: whether a value is a vector of numbers, which the tabular view projects.
    """

    settings: frozenset[str]
    has_features: bool = True
    is_bag: bool = False
    has_text: bool = True
    is_vector: bool = False


_VALUES = frozenset({"min_count", "hash_buckets", "share_embedding", "show_oov"})
_SEVERAL = _VALUES | {"separator", "max_values"}

FIELD_KINDS: dict[str, FieldKindTraits] = {
    "categorical": FieldKindTraits(_VALUES),
    "numeric": FieldKindTraits(frozenset({"bucketing", "num_buckets"})),
    "multi_categorical": FieldKindTraits(_SEVERAL, is_bag=True),
    "sequence": FieldKindTraits(_SEVERAL | {"target", "text_values"}, is_bag=True),
    "text": FieldKindTraits(frozenset(), has_features=False),
    "vector": FieldKindTraits(frozenset({"size"}), has_text=False, is_vector=True),
}
"""The kinds of field by name."""


@dataclass(frozen=True)
class FieldConfig:
    """One field (column) of the click log, and how both views show it.

    Args:
        name: column name.
        text_name: words that name the field in the text; by default `name` with underscores replaced by spaces.
        kind: `"categorical"`: one value a row. `"numeric"`: a number; the tabular view has its bucket, the text the
            number itself. `"multi_categorical"`: any number of values without an order. `"sequence"`: values in the
            order of time, the most recent last. `"text"`: in the text only. `"vector"`: a list of `size` numbers, such
            as the embedding of a picture; it is projected to the embedding width and not shown in the text.
        max_tokens: maximum number of tokens of the field in a row's text. The rest is cut, and counted as a fallback.
        min_count: values that occur fewer times than this in fitting share the field's OOV feature.
        hash_buckets: number of features that values are hashed into, for fields with too many values to keep. No value
            is stored, and none is OOV.
        share_embedding: name of another field whose features (vocabulary and rows of the feature table) this field
            uses.
        show_oov: whether the text shows values that fitting did not keep. An unseen title is informative, but an unseen
            id only misleads the text encoder. With False, such a value is shown as missing; a field with several values
            leaves it out.
        separator: separator of the values in a multi-valued column of strings; not needed for a column of lists.
        max_values: maximum number of values of a row in the tabular view; of a sequence, the last ones are kept.
        target: name of the single-valued field whose embedding attends to the sequence, as in DIN (Zhou et al., KDD
            2018, arXiv 1706.06978, Section 4.3). Without it the sequence is averaged.
        text_values: maximum number of values of a sequence in the text, the most recent first; by default
            `max_values`.
        bucketing: how numbers are put into buckets: `"quantile"`, with equally many training rows in each, or `"log"`,
            with equal ratios between the bounds.
        num_buckets: maximum number of buckets.
        size: how many numbers a vector has. A vector of size 1 is a number that is not put into buckets.
        vector_size: size of the vectors that fitting attached to the field's values (`TextFeatures`); None if there are
            none. Fields that share the field's features have the same vectors.
        num_features: rows of the feature table that the field got in fitting, including OOV and MISSING.
        added_features: rows added by each later `FlipProcessor.extend`.
        value_hashes: fingerprints of the values that got their own features in fitting and in each extension. They show
            whether a processor and a model belong together.
    """

    name: str
    text_name: str | None = None
    kind: str = "categorical"
    max_tokens: int = 64
    min_count: int = 1
    hash_buckets: int | None = None
    share_embedding: str | None = None
    show_oov: bool = True
    separator: str | None = None
    max_values: int = 20
    target: str | None = None
    text_values: int | None = None
    bucketing: str = "quantile"
    num_buckets: int = 32
    size: int | None = None
    vector_size: int | None = None
    num_features: int | None = None
    added_features: tuple[int, ...] = ()
    value_hashes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a field needs a column name, such as FieldConfig('user_id'); got {self.name!r}")
        for setting in ("text_name", "kind", "share_embedding", "separator", "target", "bucketing"):
            value = getattr(self, setting)
            if not isinstance(value, str) and (value is not None or _DEFAULTS[setting] is not None):
                raise ValueError(f"field {self.name!r}: {setting}={value!r} must be a string")
        if self.kind not in FIELD_KINDS:
            raise ValueError(f"field {self.name!r}: kind={self.kind!r} is not one of {', '.join(FIELD_KINDS)}")
        for setting in _SEVERAL | {"target", "text_values", "bucketing", "num_buckets", "size"}:
            if setting not in self.traits.settings and getattr(self, setting) != _DEFAULTS[setting]:
                kinds = ", ".join(name for name, traits in FIELD_KINDS.items() if setting in traits.settings)
                raise ValueError(
                    f"field {self.name!r}: {setting} is a setting of the kinds {kinds}, not of kind={self.kind!r}"
                )
        least = {"max_tokens": 1, "min_count": 1, "hash_buckets": 1, "max_values": 1, "text_values": 1}
        least |= {"size": 1, "vector_size": 1, "num_buckets": 2}
        least |= {"num_features": NUM_RESERVED_FEATURES if self.owns_features else 0}
        for setting, number in least.items():
            value = getattr(self, setting)
            if value is None and _DEFAULTS[setting] is None:
                continue
            if not is_whole(value) or value < number:
                raise ValueError(
                    f"field {self.name!r}: {setting}={value!r} must be a whole number of at least {number}"
                )
        if self.traits.is_vector and self.size is None:
            raise ValueError(f"field {self.name!r}: kind={self.kind!r} needs size, the numbers of a vector")
        for setting in ("size", "vector_size"):
            if (value := getattr(self, setting)) is not None and value > LARGEST_VECTOR:
                raise ValueError(f"field {self.name!r}: {setting}={value} is above the limit of {LARGEST_VECTOR}")
        if self.vector_size is not None and (self.traits.is_vector or not self.owns_features):
            raise ValueError(f"field {self.name!r}: only a field with features of its own can have vector_size")
        if self.bucketing not in BUCKETINGS:
            raise ValueError(f"field {self.name!r}: bucketing={self.bucketing!r} is not one of {', '.join(BUCKETINGS)}")
        if self.separator == "":
            raise ValueError(f"field {self.name!r}: separator must not be empty")
        added = self.added_features
        if not isinstance(added, list | tuple) or not all(is_whole(n) and n >= 0 for n in added):
            raise ValueError(f"field {self.name!r}: added_features={added!r} must be whole numbers of at least 0")
        if len(added) > MOST_EXTENSIONS:
            raise ValueError(f"field {self.name!r}: extended {len(added)} times; the limit is {MOST_EXTENSIONS}")
        object.__setattr__(self, "added_features", tuple(added))
        hashes = self.value_hashes
        if not isinstance(hashes, list | tuple) or not all(isinstance(value, str) for value in hashes):
            raise ValueError(f"field {self.name!r}: value_hashes={hashes!r:.80} must be strings")
        if hashes and len(hashes) != 1 + len(added):
            raise ValueError(
                f"field {self.name!r}: {len(hashes)} value_hashes for a field that was extended {len(added)} times"
            )
        object.__setattr__(self, "value_hashes", tuple(hashes))
        own = [setting for setting in ("min_count", "hash_buckets") if getattr(self, setting) != _DEFAULTS[setting]]
        if self.share_embedding is not None and own:
            raise ValueError(f"field {self.name!r} uses the features of {self.share_embedding!r}; set {own[0]} there")
        if not isinstance(self.show_oov, bool):
            raise ValueError(f"field {self.name!r}: show_oov={self.show_oov!r} must be true or false")
        others = [setting for setting in ("min_count", "show_oov") if getattr(self, setting) != _DEFAULTS[setting]]
        if self.hash_buckets is not None and others:
            raise ValueError(f"field {self.name!r}: {others[0]} has no effect with hash_buckets; set only one of them")

    @property
    def traits(self) -> FieldKindTraits:
        """Properties of the field's kind."""
        return FIELD_KINDS[self.kind]

    @property
    def owns_features(self) -> bool:
        """Whether the field has rows of the feature table of its own."""
        return self.traits.has_features and self.share_embedding is None

    @property
    def num_positions(self) -> int:
        """Number of columns of `feature_ids` that the field takes."""
        if not self.traits.has_features:
            return 0
        return self.max_values if self.traits.is_bag else 1

    @property
    def display_name(self) -> str:
        """The words that name the field in the text."""
        return self.text_name if self.text_name is not None else self.name.replace("_", " ")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FieldConfig":
        """Builds a field from the output of `to_dict`; an unknown setting is a ValueError."""
        cls.check_names(values)
        return cls(**values)

    @classmethod
    def check_saved(cls, fields: Any, source: str) -> None:
        """Raises ValueError if a saved file has settings of fields that this version does not know.

        Args:
            fields: the fields in the file; anything other than a list of dicts is ignored.
            source: the file's name.
        """
        for values in fields if isinstance(fields, list) else []:
            if isinstance(values, dict):
                try:
                    cls.check_names(values)
                except ValueError as error:
                    raise ValueError(
                        f"{source}: {error}; a newer version may have written them. Upgrade flip_hf, because the model "
                        "would differ without them"
                    ) from error

    @classmethod
    def check_names(cls, values: Mapping[str, Any]) -> None:
        """Raises ValueError for the names of settings that a field does not have."""
        known = sorted(f.name for f in fields(cls))
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"field {values.get('name')!r}: unknown settings {with_nearest(unknown, known)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as plain JSON types."""
        values = {name: value for name, value in asdict(self).items() if value != _DEFAULTS.get(name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def fitted(self, num_features: int, value_hash: str | None = None) -> "FieldConfig":
        """Returns this field with the number of features from fitting, and the fingerprint of its values."""
        return replace(self, num_features=num_features, value_hashes=() if value_hash is None else (value_hash,))

    def extended(self, num_features: int, value_hash: str) -> "FieldConfig":
        """Returns this field with this many added features, and the fingerprint of their values."""
        # A field that an earlier version fitted has no fingerprints.
        hashes = (*self.value_hashes, value_hash) if self.value_hashes else ()
        return replace(self, added_features=(*self.added_features, num_features), value_hashes=hashes)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(FieldConfig) if f.name != "name"}


def with_nearest(unknown: Iterable[str], known: Collection[str]) -> str:
    """Unknown names for an error message, each with the nearest known name, or with all known names if none is near."""
    shown = []
    for name in unknown:
        near = nearest(name, known)
        shown.append(f"{name!r} (did you mean {near!r}?)" if near else f"{name!r} (known: {', '.join(known)})")
    return ", ".join(shown)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most similar to a misspelt one; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def printable(text: str) -> str:
    """The text on one line, with control characters escaped so that they can't affect a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, and not a Boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_fields(values: Sequence[FieldConfig | dict[str, Any] | str]) -> list[FieldConfig]:
    """Builds fields from the forms that users and JSON files give: FieldConfig, dict or plain column name.

    Raises:
        ValueError: the fields are not a list, two have the same name, a field refers to another field that does not
            exist or does not fit, or there are too many.
    """
    if isinstance(values, str | bytes | Mapping | FieldConfig) or not isinstance(values, Iterable):
        raise ValueError(
            f"fields={values!r:.80} must be a list of column names and FieldConfig; put a single field into a list"
        )
    values = list(values)
    if len(values) > MOST_FIELDS:
        raise ValueError(f"{len(values)} fields are too many: the limit is {MOST_FIELDS}")
    result = []
    for value in values:
        if isinstance(value, dict):
            result.append(FieldConfig.from_dict(value))
        elif isinstance(value, str | FieldConfig):
            result.append(FieldConfig(value) if isinstance(value, str) else value)
        else:
            raise ValueError(f"a field is a column name or a dict of settings; got {value!r}")
    if repeated := sorted(name for name, number in Counter(f.name for f in result).items() if number > 1):
        raise ValueError(f"fields named twice: {', '.join(map(repr, repeated))}")
    if (num_positions := sum(f.num_positions for f in result)) > MOST_POSITIONS:
        widest = max(result, key=lambda f: f.num_positions)
        raise ValueError(
            f"field {widest.name!r}: max_values={widest.max_values} is too large: all fields together take "
            f"{num_positions} columns of feature_ids, and the limit is {MOST_POSITIONS}"
        )
    by_name = {f.name: f for f in result}
    for f in result:
        for setting in ("share_embedding", "target"):
            other = getattr(f, setting)
            if other is not None and other not in by_name:
                raise ValueError(f"field {f.name!r}: {setting}={other!r} is not the name of a field")
        if f.share_embedding is not None:
            owner = by_name[f.share_embedding]
            if not owner.owns_features or "share_embedding" not in owner.traits.settings:
                raise ValueError(f"field {f.name!r} can't share the features of {owner.name!r}, which owns none")
            if owner.hash_buckets is not None and not f.show_oov:
                raise ValueError(
                    f"field {f.name!r}: show_oov has no effect, because {owner.name!r}, whose features it uses, has "
                    "hash_buckets; leave show_oov out"
                )
        if f.target is not None and by_name[f.target].num_positions != 1:
            raise ValueError(f"field {f.name!r}: target={f.target!r} must be a field with one feature a row")
    return result


def tabular_fields(fields: Sequence[FieldConfig]) -> list[FieldConfig]:
    """The fields of the tabular view, in order."""
    return [f for f in fields if f.traits.has_features]


def text_fields(fields: Sequence[FieldConfig]) -> list[FieldConfig]:
    """The fields of the textual view, in order."""
    return [f for f in fields if f.traits.has_text]


def vector_sizes(fields: Sequence[FieldConfig]) -> dict[str, int]:
    """Size of the vectors that the tabular view projects, by the name of the field that owns them, in order."""
    sizes = {f.name: f.size if f.traits.is_vector else f.vector_size for f in fields}
    return {name: size for name, size in sizes.items() if size is not None}


def vector_owners(fields: Sequence[FieldConfig]) -> list[str | None]:
    """For each position (column of `feature_ids`), the field that owns its vectors; None if it has none."""
    sizes = vector_sizes(fields)
    owners = [(f.share_embedding or f.name, f.num_positions) for f in tabular_fields(fields)]
    return [name if name in sizes else None for name, number in owners for _ in range(number)]


def owned_ranges(fields: Sequence[FieldConfig]) -> list[list[tuple[int, int]]]:
    """For each field, the ranges (first, end) of global feature ids that it owns.

    The first range comes from fitting, and starts with OOV and MISSING. Each `FlipProcessor.extend` adds a range behind
    all existing ones, so that ids never change.

    Raises:
        ValueError: a field has no `num_features` yet.
    """
    ranges: list[list[tuple[int, int]]] = [[] for _ in fields]
    sizes = []
    for i, f in enumerate(fields):
        if f.num_features is None:
            raise ValueError(f"field {f.name!r} is not fitted; pass the fields of a fitted processor: processor.fields")
        if f.owns_features:
            sizes += [(generation, i, size) for generation, size in enumerate((f.num_features, *f.added_features))]
    end = NUM_SHARED_FEATURES
    for generation, i, size in sorted(sizes):
        if size or generation == 0:
            ranges[i].append((end, end + size))
            end += size
    return ranges


def feature_ranges(fields: Sequence[FieldConfig]) -> list[list[tuple[int, int]]]:
    """For each field of the tabular view, the ranges (first, end) of the ids that it may hold: its own or shared ones.

    `oov_id` and `missing_id` return the reserved features of such ranges.
    """
    by_name = dict(zip((f.name for f in fields), owned_ranges(fields), strict=True))
    return [by_name[f.share_embedding or f.name] for f in tabular_fields(fields)]


def oov_id(ranges: Sequence[tuple[int, int]]) -> int:
    """Returns the OOV feature of a field.

    Args:
        ranges: the ranges of ids that the field may hold, one item of the result of `feature_ranges`.
    """
    return ranges[0][0] + OOV_OFFSET


def missing_id(ranges: Sequence[tuple[int, int]]) -> int:
    """Returns the MISSING feature of a field; the argument is as in `oov_id`."""
    return ranges[0][0] + MISSING_OFFSET


def num_features(fields: Sequence[FieldConfig]) -> int:
    """Number of rows of the feature table."""
    return max((end for ranges in owned_ranges(fields) for _, end in ranges), default=NUM_SHARED_FEATURES)
