"""What `diff` returns: numbers of pairs of layers, as rows, a table, and a verdict in a sentence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import polars

QUANTITIES = ("weight", "input", "output", "gradient")
MORE = ["...", *[""] * 6]


class Compared(NamedTuple):
    """One quantity of one pair of layers."""

    layer: int
    """In forward order, from 1 on."""
    path_a: str
    path_b: str
    quantity: str
    """"weight", "input", "output" or "gradient" (of the weight)."""
    difference: float
    """|a - b| / max(|a|, |b|), Frobenius, in the layout in which both agree best."""
    rounding: float
    """What rounding would give."""
    differs: bool
    note: str


class Both(NamedTuple):
    """A number of both sides."""

    name: str
    a: float
    b: float
    difference: float
    rounding: float
    differs: bool


@dataclass(frozen=True)
class Difference:
    """What `fnn.diff(loss_a, loss_b)(params_a, params_b, batch)` returns: `print` it, or read `rows()` and `table()`.

    `equal` is the answer, `verdict` says it in a sentence, `first_forward` and `first_backward` are numbers of layers. `print`
    shows all of up to 32 layers; of more, the ends and where differences begin.
    """

    compared: tuple[Compared, ...]
    loss: Both
    gradient: Both
    """Norms of the gradients of all parameters, those outside of products too; counts where both have as many numbers."""
    unpaired_a: tuple[str, ...]
    """Layers of the first loss that have no partner."""
    unpaired_b: tuple[str, ...]
    alone_a: tuple[str, ...]
    """Parameters that are no factor of a product (biases, scales of norms): seen only by what they do to outputs, and in the norm of the gradient."""
    alone_b: tuple[str, ...]
    parameters: tuple[Compared, ...] = ()
    """Whole gradients of parameters, all their uses added up, with layer 0: of each, or of those outside of products together."""

    @property
    def equal(self) -> bool:
        """Whether all layers have partners and nothing differs by more than rounding."""
        rows = (*self.compared, *self.parameters)
        differs = self.loss.differs or self.gradient.differs or any(row.differs for row in rows)
        return not (differs or self.unpaired_a or self.unpaired_b)

    @property
    def first_forward(self) -> int | None:
        """The first layer at which weights or forward values differ; None if none does."""
        return next((row.layer for row in self.compared if row.differs and row.quantity != "gradient"), None)

    @property
    def first_backward(self) -> int | None:
        """The first layer, from the output backwards, whose weight's gradient differs; None if none does."""
        return next((row.layer for row in self.compared[::-1] if row.differs and row.quantity == "gradient"), None)

    @property
    def verdict(self) -> str:
        """One sentence: equal, or where the difference begins and what it is."""
        return _verdict(self)

    def _shown(self, layers: list[int]) -> set[int]:
        """Choose the layers that `print` shows: all of few, else the ends and where differences begin."""
        if len(layers) <= 32:
            return set(layers)
        begin = [number for number in (self.first_forward, self.first_backward) if number is not None]
        return {*layers[:6], *layers[-6:], *(n for b in begin for n in range(b - 3, b + 4))}

    def rows(self) -> list[Compared]:
        """List all that was compared of pairs of layers, in forward order."""
        return list(self.compared)

    def table(self) -> "polars.DataFrame":
        """Make a polars DataFrame with the columns of `Compared`: layer, path_a, path_b, quantity, difference, ..."""
        import polars as pl

        kinds = (pl.Int64, pl.String, pl.String, pl.String, pl.Float64, pl.Float64, pl.Boolean, pl.String)
        schema = dict(zip(Compared._fields, kinds, strict=True))
        return pl.DataFrame([row._asdict() for row in self.compared], schema=schema)

    def __str__(self) -> str:
        layers: dict[int, dict[str, Compared]] = {}
        for row in self.compared:
            layers.setdefault(row.layer, {})[row.quantity] = row
        head = ["layer", "a", "b", *QUANTITIES]
        lines = [head]
        shown = self._shown(list(layers))
        for layer, found in layers.items():
            if layer not in shown:
                if lines[-1] != MORE:
                    lines.append(MORE)
                continue
            first = next(iter(found.values()))
            cells = [_cell(found.get(quantity)) for quantity in QUANTITIES]
            lines.append([str(layer), first.path_a, first.path_b, *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            self.verdict,
            f"loss: {self.loss.a:.8g} and {self.loss.b:.8g}; norm of the gradient: {self.gradient.a:.6g} and {self.gradient.b:.6g}",
        ]
        if layers:
            text += [
                "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines
            ]
            text.append("relative differences; * above what rounding gives")
        notes = [row for row in self.compared if row.note and row.layer in shown]
        text += dict.fromkeys(f"layer {row.layer}, {row.quantity}: {row.note}" for row in notes)
        for name, paths in (("a", self.unpaired_a), ("b", self.unpaired_b)):
            text += [f"without a partner, {name}: {', '.join(paths)}"] if paths else []
        return "\n".join(text)


def _cell(row: Compared | None) -> str:
    return "-" if row is None else f"{row.difference:.1e}{' *' if row.differs else ''}"


def _verdict(found: Difference) -> str:
    missing = sum(map(len, (found.unpaired_a, found.unpaired_b)))
    rest = "" if not missing else f"; {missing} layer{' has' if missing == 1 else 's have'} no partner"
    if not found.compared:
        return "nothing to compare: no layers could be paired" + rest
    first, last = found.first_forward, found.first_backward
    if first is not None:
        return _forward(found, first) + rest
    if last is not None:
        rows = {row.quantity: row for row in found.compared if row.layer == last}
        row, layers = rows["gradient"], found.compared[-1].layer
        start = "the last layer" if last == layers else f"layer {last} of {layers}, counted from the output"
        note = f" ({row.note})" if row.note else ""
        losses = (
            "; the losses differ too: what follows the last layer computes something else" if found.loss.differs else ""
        )
        return (
            f"forward values are equal to rounding; gradients differ from {start} on: of {_name(row)} by "
            f"{row.difference:.2g} (rounding: {row.rounding:.1g}){note}{losses}{rest}"
        )
    odd = [row for row in found.parameters if row.differs]
    names = ", ".join(row.path_a for row in odd[:6])
    whose = f"the whole gradient of {names}" if odd else "the norm of the whole gradient"
    if found.loss.differs and (odd or found.gradient.differs):
        return (
            f"all layers are equal to rounding, the losses and {whose} are not: one has a term of the parameters themselves, "
            f"such as a penalty{rest}"
        )
    if found.loss.differs:
        return f"all layers are equal to rounding, the losses are not: what follows the last layer computes something else{rest}"
    if odd:
        worst = max(odd, key=lambda row: row.difference)
        return (
            f"all layers are equal to rounding, {whose} is not: it differs by {worst.difference:.2g} (rounding: "
            f"{worst.rounding:.1g}); look at parameters outside of products, and at weights that are used elsewhere too{rest}"
        )
    if found.gradient.differs:
        names = ", ".join((found.alone_a or found.alone_b)[:6])
        return (
            f"all layers are equal to rounding, the norm of the whole gradient is not: it differs by "
            f"{found.gradient.difference:.2g} (rounding: {found.gradient.rounding:.1g}); look at parameters outside of products"
            f"{f' ({names})' if names else ''}, and at weights that are used elsewhere too{rest}"
        )
    return f"{'what was paired is ' if missing else ''}equal to rounding{rest}"


def _forward(found: Difference, first: int) -> str:
    rows = {row.quantity: row for row in found.compared if row.layer == first}
    before = [row for row in found.compared if row.layer == first - 1]
    differs = [
        rows[quantity] for quantity in ("weight", "input", "output") if quantity in rows and rows[quantity].differs
    ]
    row = differs[0]
    words = {"weight": "the weight", "input": "the input", "output": "the output"}[row.quantity]
    start = (
        f"differs from layer {first} on: {words} of {_name(row)} by {row.difference:.2g} (rounding: {row.rounding:.1g})"
    )
    note = f" ({row.note})" if row.note else ""
    if row.quantity == "weight":
        return start + note
    if row.quantity == "input":
        what = "the batch is prepared differently" if not before else f"what lies between {before[0].path_a} and it"
        why = "" if not before else " computes something else (activation? norm or its epsilon? dropout? a sum?)"
        return f"{start}{note}; all before it is equal: {what}{why}"
    known = "its weights are equal, its inputs are equal" if "input" in rows else "its weights are equal"
    return f"{start}{note}; {known}: the layer computes something else (bias? scale? padding? precision?)"


def _name(row: Compared) -> str:
    return row.path_a if row.path_a == row.path_b else f"{row.path_a} ({row.path_b})"
