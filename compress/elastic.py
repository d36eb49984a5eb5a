"""One run, many sizes: nested sub-networks that share their weights, each of which can be cut out (`export --size`).

MatFormer (arXiv 2310.07707) nests prefixes of the intermediate channels, POA (arXiv 2408.01031) those of all channels
and evenly spaced blocks: a sub-network of hidden size h, intermediate size f, a heads and l layers uses the first h
channels, the first f intermediate ones, the first a heads, and blocks floor(linspace(0, L - 1, l)) of L.

Where we differ: POA multiplies what enters a truncated layer by full / active size; here RMSNorm over the active
channels does what that is for, and a sub-network's weights are those of the whole model, bit for bit. MatFormer's code
puts the activation on gate times up; here it is on the gate, as in the model.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgewright.compress.choice import WholeModel
from edgewright.compress.shape import HEADS_DIVIDE_HIDDEN, Shape, legal_multiples, refused
from edgewright.errors import BadInput, RecipeError, RecipeErrors
from edgewright.method import Method, MethodReport

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from edgewright.compress.elastic_layers import ElasticLinear, Net, Size
    from edgewright.export.lattice import LatticeTensor

SIZES_FILE = "elastic.json"
"""Beside an elastic model: its sizes."""
MOST_SIZES = 10_000
AXES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


class ElasticConfig(WholeModel):
    """Sub-networks of many sizes in one model, trained together by the objective `sandwich` (MatFormer,
    arXiv 2310.07707; POA, arXiv 2408.01031).

    Each list has the sizes below that of the whole model, which is always one; every combination is a sub-network.
    """

    type: Literal["elastic"] = "elastic"
    hidden_size: tuple[int, ...] = ()
    intermediate_size: tuple[int, ...] = ()
    num_attention_heads: tuple[int, ...] = ()
    num_hidden_layers: tuple[int, ...] = ()
    multiple_of: Literal[1, 32, 64, 128, 256] = 32
    """Hidden and intermediate sizes, and heads times their size, are multiples of it, as the target format wants."""

    @model_validator(mode="after")
    def _whole(self) -> ElasticConfig:
        self.check_takes_all()
        given = self.model_dump()
        if not any(given[name] for name in AXES):
            raise ValueError(f"one size is no choice: give smaller sizes in at least one of {', '.join(AXES)}")
        return self

    def finished(self) -> str:
        return "plain weights, for every format; export --size cuts a sub-network out"

    def build(self) -> Elastic:
        return Elastic(self)

    def sizes(self, config: PretrainedConfig) -> list[Size]:
        """Every sub-network of a model, by their weights.

        Raises:
            RecipeErrors: EW-765, sizes that it cannot have, each with the nearest that it can.
        """
        from edgewright.compress.elastic_layers import Size

        full, given = Shape.of(config), self.model_dump()
        errors = list(self._errors(full)) or list(self._undivided(full, config.model_type))
        if errors:
            raise errors[0] if len(errors) == 1 else RecipeErrors(errors)
        options = [sorted({*given[name], full.numbers()[name]}) for name in AXES]
        found = []
        for hidden, inner, heads, layers in itertools.product(*options):
            shape = Shape(
                hidden_size=hidden,
                intermediate_size=inner,
                num_attention_heads=heads,
                num_key_value_heads=heads // full.group,
                num_hidden_layers=layers,
                head_dim=full.head_dim,
            )
            found.append(Size(shape=shape, blocks=spaced(full.num_hidden_layers, layers)))
        if len(found) > MOST_SIZES:
            raise RecipeError(
                "EW-765",
                "these are too many sub-networks",
                expected=f"at most {MOST_SIZES:,} combinations",
                found=f"{len(found):,}",
                fix="give fewer sizes in the lists of elastic",
            )
        return sorted(found, key=lambda size: (weights_in_blocks(size.shape), size.name))

    def _undivided(self, full: Shape, model_type: str) -> Iterator[RecipeError]:
        """Where the family wants hidden sizes that its heads divide: those of the whole model divide them all."""
        if model_type not in HEADS_DIVIDE_HIDDEN:
            return
        most = full.num_attention_heads
        step = math.lcm(most, self.multiple_of)
        for hidden in self.hidden_size:
            if hidden % most:
                why = f"{model_type} wants a multiple of the heads, and the whole model has {most}"
                legal = [*legal_multiples(1, full.hidden_size - 1, step), full.hidden_size]
                yield refused("EW-765", "hidden_size", hidden, why, legal)
        hidden_sizes = {*(hidden for hidden in self.hidden_size if hidden % most == 0), full.hidden_size}

        def divides(heads: int) -> bool:
            return not any(hidden % heads for hidden in hidden_sizes)

        for heads in self.num_attention_heads:
            if not divides(heads):
                every = ", ".join(map(str, sorted(hidden_sizes)))
                why = f"{model_type} wants hidden sizes, here {every}, that are multiples of the heads"
                yield refused("EW-765", "num_attention_heads", heads, why, filter(divides, self._head_sizes(full)))

    def _head_sizes(self, full: Shape) -> list[int]:
        """Heads that a sub-network can have."""
        return [
            heads
            for heads in range(full.group, full.num_attention_heads + 1, full.group)
            if heads == full.num_attention_heads or heads * full.head_dim % self.multiple_of == 0
        ]

    def _errors(self, full: Shape) -> Iterator[RecipeError]:
        legal: dict[str, Sequence[int]] = {
            "hidden_size": legal_multiples(1, full.hidden_size - 1, self.multiple_of),
            "intermediate_size": legal_multiples(1, full.intermediate_size - 1, self.multiple_of),
            "num_attention_heads": self._head_sizes(full),
            "num_hidden_layers": range(1, full.num_hidden_layers + 1),
        }
        whys = {
            "num_attention_heads": f"heads come in groups of {full.group}, and times their size, {full.head_dim}, they "
            f"must be a multiple of {self.multiple_of}",
            "num_hidden_layers": "a sub-network has at least one block",
        }
        given = self.model_dump()
        for name in AXES:
            whole = full.numbers()[name]
            for asked in given[name]:
                if asked != whole and asked not in legal[name]:
                    larger = f"the whole model has {whole}"
                    why = larger if asked > whole else whys.get(name, f"it must be a multiple of {self.multiple_of}")
                    yield refused("EW-765", name, asked, why, [*legal[name], whole])


class Elastic(Method):
    """Replaces every layer by one that can use a part of itself; the trained weights are those of the whole model."""

    type = "elastic"
    saves = "runs: one training gives models of many sizes"
    compiles = False

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config
        self.net: Net | None = None
        self._layers: dict[str, ElasticLinear] = {}

    def kept_whole(self) -> str | None:
        return "sub-networks use parts of whole weights"

    def chosen(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        """All linear layers, the head too.

        Raises:
            RecipeError: EW-761, EW-765; EW-711, EW-713 as `choose`.
        """
        from edgewright.compress.axes import check_axes
        from edgewright.compress.layers import choose

        check_axes(model, model.config.model_type, "made elastic")
        self.config.sizes(model.config)
        return choose(model, self.config, method=self.type, head=True)

    def prepare(self, model: PreTrainedModel) -> None:
        from edgewright.compress.elastic_layers import Net, make_elastic

        self.chosen(model)
        self.net = Net(self.config.sizes(model.config))
        self._layers = make_elastic(model, self.net)

    def finish(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, LatticeTensor]]:
        """The whole model with plain layers."""
        from edgewright.compress.cut import cut, prefix

        assert self.net is not None, "prepare() comes first"
        shape = Shape.of(model.config)
        return cut(model, prefix(shape, shape, range(shape.num_hidden_layers))), {}

    def write_beside(self, directory: Path) -> None:
        """`elastic.json`: the sizes that can be cut out."""
        from edgewright.files import write_json

        assert self.net is not None, "prepare() comes first"
        sizes = [{"name": size.name, **size.shape.numbers(), "blocks": list(size.blocks)} for size in self.net.sizes]
        write_json(directory / SIZES_FILE, {"schema_version": 1, "sizes": sizes})

    def describe(self, model: PreTrainedModel) -> MethodReport:
        """Layers changed, what they cost, `sizes`, and the share of the weights in blocks that the smallest has."""
        from edgewright.compress.layers import cost, skipped

        assert self.net is not None, "prepare() comes first"
        smallest, full = (weights_in_blocks(self.net.sizes[index].shape) for index in (0, -1))
        numbers = cost(self._layers.values()) | {"sizes": float(len(self.net.sizes)), "smallest": smallest / full}
        return MethodReport(changed=len(self._layers), skipped=skipped(model), numbers=numbers)


def spaced(there: int, wanted: int) -> tuple[int, ...]:
    """floor(linspace(0, there - 1, wanted)), in whole numbers: POA's choice of blocks."""
    if wanted == 1:
        return (0,)
    return tuple(index * (there - 1) // (wanted - 1) for index in range(wanted))


def weights_in_blocks(shape: Shape) -> int:
    """Weights of the linear layers in all blocks."""
    attention = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    return shape.num_hidden_layers * shape.hidden_size * (attention + 3 * shape.intermediate_size)


class _StoredSize(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    blocks: tuple[int, ...]


class _StoredSizes(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1]
    sizes: tuple[_StoredSize, ...] = Field(min_length=1, max_length=MOST_SIZES)


def sizes_of(directory: Path | str) -> list[Size]:
    """The sub-networks of an elastic model's directory, from the smallest to the whole model.

    Raises:
        BadInput: EW-768, it is not elastic, or its list of sizes is damaged.
    """
    from edgewright.compress.elastic_layers import Size
    from edgewright.export.architecture import open_config
    from edgewright.export.guard import check_model_directory, read_json

    directory = Path(directory)
    check_model_directory(directory)
    path = directory / SIZES_FILE
    if not path.is_file():
        raise BadInput(
            "EW-768",
            "this model has no sub-networks",
            where=directory.absolute(),
            expected=f"a model that was trained with the method elastic, with {SIZES_FILE} beside its weights",
            found="none",
            fix="leave --size out, or train with methods: [{type: elastic, ...}]",
        )
    try:
        stored = _StoredSizes.model_validate(read_json(path))
    except ValidationError as error:
        raise _damaged(path, str(error.errors()[0]["msg"])) from None
    full = Shape.of(open_config(directory))
    found = []
    for each in stored.sizes:
        shape = Shape(**each.model_dump(exclude={"name", "blocks"}))
        size = Size(shape=shape, blocks=each.blocks)
        inside = all(value <= full.numbers()[name] for name, value in shape.numbers().items())
        blocks = sorted(set(each.blocks))
        fits = list(each.blocks) == blocks and len(blocks) == shape.num_hidden_layers
        fits = fits and blocks[0] >= 0 and blocks[-1] < full.num_hidden_layers
        same = shape.head_dim == full.head_dim and shape.num_key_value_heads * full.group == shape.num_attention_heads
        if not (inside and fits and same and size.name == each.name):
            raise _damaged(path, f"{each.name}, which is no part of this model")
        found.append(size)
    return found


def _damaged(path: Path, found: str) -> BadInput:
    return BadInput(
        "EW-768",
        "the list of sub-networks beside this model is damaged",
        where=path.absolute(),
        expected="what the method elastic writes there",
        found=found[:200],
        fix="copy the model directory again",
    )


def find_size(sizes: Sequence[Size], name: str, where: str | Path) -> Size:
    """The sub-network of a name.

    Args:
        where: the model's directory or the recipe's key, for the message.

    Raises:
        RecipeError: EW-766, there is none; it names the nearest, and the others.
    """
    by_name = {size.name: size for size in sizes}
    if name in by_name:
        return by_name[name]
    near = _nearest(by_name, name)
    shown = ", ".join(by_name) if len(by_name) <= 24 else f"{', '.join(near)} and {len(by_name) - len(near)} others"
    raise RecipeError(
        "EW-766",
        "this model has no sub-network of that name",
        where=where,
        expected=shown,
        found=name,
        fix=f"--size {near[0]}; {SIZES_FILE} beside the model lists all of them",
    )


def _nearest(by_name: Mapping[str, Size], name: str) -> list[str]:
    """The three sizes that differ least from one that is asked for; by spelling where it is no size at all."""
    asked = re.fullmatch(r"h(\d+)-f(\d+)-a(\d+)-l(\d+)", name)
    if asked is None:
        return difflib.get_close_matches(name, by_name, n=3, cutoff=0.3) or list(by_name)[:3]
    wanted = [max(1, int(number)) for number in asked.groups()]

    def apart(known: str) -> float:
        numbers = by_name[known].shape.numbers()
        return sum(abs(math.log(numbers[axis] / size)) for axis, size in zip(AXES, wanted, strict=True))

    return sorted(by_name, key=apart)[:3]


def sub_network(directory: Path | str, size: str) -> PreTrainedModel:
    """Cut a sub-network out of an elastic model: a plain model whose logits are those of the slice, bit for bit.

    Args:
        directory: of the elastic model.
        size: its name, see `sizes_of`.

    Raises:
        RecipeError: EW-766, there is none of that name. BadInput: EW-768, as `sizes_of`; as `load_model`.
    """
    from edgewright.compress.cut import cut, prefix
    from edgewright.student import load_model

    directory = Path(directory)
    found = find_size(sizes_of(directory), size, directory.absolute())
    model = load_model(directory)
    return cut(model, prefix(Shape.of(model.config), found.shape, found.blocks))


@contextmanager
def sub_network_folder(directory: Path | str, size: str, beside: Path) -> Iterator[Path]:
    """A sub-network in a temporary folder beside a path, under the name of the model and the size.

    Raises:
        As `save_sub_network`.
    """
    from edgewright.export.scratch import scratch
    from edgewright.export.staging import folder

    whole = Path(directory).resolve()
    name = whole.parent.name if whole.name == "model" else whole.name
    with folder(beside.absolute().parent), scratch(beside) as place:
        yield save_sub_network(directory, size, place / f"{name}-{size}")


def save_sub_network(directory: Path | str, size: str, out: Path | str) -> Path:
    """Write a sub-network as a Hugging Face directory of its own, with the tokenizer; atomically.

    Raises:
        As `sub_network`. RecipeError: EW-509, `out` is there already. OutOfResources: EW-401.
    """
    from edgewright.export.staging import folder, staged, swap
    from edgewright.export.tokenizer_files import write_tokenizer
    from edgewright.files import disk_errors
    from edgewright.student import without_progress_bars

    target = Path(out)
    if target.exists():
        raise RecipeError(
            "EW-509", "the sub-network would overwrite something else", where=target.absolute(),
            expected="a folder that is not there yet", fix="choose another folder, or remove this one",
        )  # fmt: skip
    model: Any = sub_network(directory, size)
    with disk_errors(target), folder(target.parent), staged(target) as place:
        with without_progress_bars():
            model.save_pretrained(place)
        write_tokenizer(Path(directory), place)
        swap(place, target)
    return target
