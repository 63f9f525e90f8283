"""Text towers: groups of fields whose texts the text encoder reads separately."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from flip_hf.fields import FieldConfig, text_fields, with_nearest

TextTowers: TypeAlias = Sequence[Sequence[str]] | Mapping[str, Sequence[str]]
"""Groups of field names; a mapping also names the towers."""


def named_towers(text_towers: TextTowers, fields: Sequence[FieldConfig]) -> dict[str, list[str]]:
    """Returns the fields of each tower by the tower's name, in the order of the text.

    Args:
        text_towers: the groups, as in `FlipConfig`. The towers of a list are named "0", "1" and so on. A mapping may
            have any order, because JSON files sort it by name.
        fields: the model's fields.

    Raises:
        ValueError: the groups do not split the text into consecutive parts.
    """
    names = [f.name for f in text_fields(fields)]
    if isinstance(text_towers, Mapping):
        place = {name: i for i, name in enumerate(names)}
        first = {tower: min((place.get(name, 0) for name in group), default=0) for tower, group in text_towers.items()}
        towers = {tower: list(text_towers[tower]) for tower in sorted(first, key=first.__getitem__)}
    else:
        towers = {str(i): list(group) for i, group in enumerate(text_towers)}
    grouped = [name for group in towers.values() for name in group]
    if len(towers) < 2 or not all(towers.values()):
        raise ValueError(f"text_towers={text_towers} must be at least two groups of fields, none of them empty")
    if vectors := [f.name for f in fields if f.name in grouped and f.name not in names]:
        raise ValueError(f"text_towers={text_towers}: leave {vectors[0]!r} out, because vectors have no text")
    if sorted(grouped) != sorted(names):
        raise ValueError(f"text_towers={text_towers} must name every field exactly once: {', '.join(map(repr, names))}")
    if grouped != names:
        raise ValueError(
            f"text_towers={text_towers} must split the text into consecutive parts, so list the fields in the order of "
            f"the text: {', '.join(map(repr, names))}"
        )
    return towers


def place_of_tower(tower: str, config: Any) -> int:
    """The index of a text tower among those of a model.

    Args:
        tower: the tower's name.
        config: the model's `FlipConfig`.

    Raises:
        ValueError: the model reads no text, or has no tower of that name.
    """
    if config.mode == "id" or config.towers is None:
        raise ValueError(
            f"tower {tower!r}: a model in mode={config.mode!r} with text_towers={config.text_towers} has no text towers"
        )
    if tower not in config.towers:
        raise ValueError(f"text_towers has no tower {with_nearest([tower], list(config.towers))}")
    return list(config.towers).index(tower)
