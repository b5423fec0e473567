"""What runs beside one base layer: each branch adds scale * dW x to the layer's output, dW never formed."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.delta import Kron
from adaptc.kernels import sparse
from adaptc.kernels.device import backend
from adaptc.kernels.resident import Resident, unpack, unpack_words


class Branch(Protocol):
    """One term of an adapter at one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def move(self, device: torch.device) -> None:
        """Move what is held to another device."""

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return y + scale * dW x, y itself changed where nothing needs its gradient (`free`)."""


def free(x: Tensor, y: Tensor) -> bool:
    """Return whether y may be written to: no graph and no tracing."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))


class Low:
    """A low-rank delta as one or more residents; `scale` is the adapter's own multiplier."""

    def __init__(self, parts: tuple[Resident, ...], scale: float) -> None:
        self.parts, self.scale = parts, scale
        self.plain = [None if part.packed else _trim(part) for part in parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the residents."""
        return sum(part.nbytes for part in self.parts)

    def move(self, device: torch.device) -> None:
        """Move the residents."""
        self.__init__(tuple(part.to(device) for part in self.parts), self.scale)  # type: ignore[misc]

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Sign planes through the kernels, plain factors through two BLAS products."""
        for part, plain in zip(self.parts, self.plain, strict=True):
            if plain is None:
                y = _add_planes(x, part, self.scale * scale, y)
            else:
                y = _add_plain(x, plain, self.scale * scale, y)
        return y


Plain = tuple[Tensor, Tensor, "Tensor | None"]


def _trim(part: Resident) -> Plain:
    """Return q (r_q, n), p (r_p, m) and the core (None: the identity) without padding or directions of no effect."""
    used = part.core.any(1), part.core.any(0)
    r_q, r_p = (int(u.nonzero().max()) + 1 if bool(u.any()) else 1 for u in used)
    core = part.core[:r_q, :r_p]
    same = r_q == r_p and torch.equal(core, torch.eye(r_q, device=core.device))
    return part.q[:r_q], part.p[:r_p], None if same else core.contiguous()


def _add_plain(x: Tensor, plain: Plain, scale: float, y: Tensor) -> Tensor:
    q, p, core = plain
    h = F.linear(x.to(q.dtype), q)
    if core is not None:
        h = (h.float() @ core).to(q.dtype)
    if y.dtype == q.dtype and h.dtype == q.dtype and y.is_contiguous() and free(x, y):
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), p, alpha=scale)
        return y
    return y + (h @ p * scale).to(y.dtype)


def _add_planes(x: Tensor, part: Resident, scale: float, y: Tensor) -> Tensor:
    m, n = part.shape
    if y.dtype == torch.float32 and y.is_contiguous() and free(x, y) and backend(x) == "native":
        from adaptc.kernels.native import linear as native

        return native.add_adapter(x.reshape(-1, n).float().contiguous(), part, scale, y.view(-1, m)).view(y.shape)
    dw: Tensor = torch.ops.adaptc.side(x.reshape(-1, n), part.q, part.p, part.core, scale)
    return y + dw.view(y.shape).to(y.dtype)


@torch.library.custom_op("adaptc::side", mutates_args=())
def side(x: Tensor, q: Tensor, p: Tensor, core: Tensor, scale: float) -> Tensor:
    """scale * dW x of a resident's parts, x (M, n); float32 inside, rounded once."""
    part, wide = Resident(q, p, core, min(core.shape)), x.float().contiguous()
    m = part.shape[0]
    if backend(x) == "native":
        from adaptc.kernels.native import linear as native

        room = torch.zeros(x.shape[0], -(-m // 16) * 16)
        return native.add_adapter(wide, part, scale, room[:, :m]).to(x.dtype).contiguous()
    p_side, inner, q_side = unpack(part)
    return (scale * (((wide @ q_side.t()) @ inner.t()) @ p_side.t())).to(x.dtype)


@side.register_fake
def _(x: Tensor, q: Tensor, p: Tensor, core: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], p.shape[1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, q, p, core, ctx.scale = inputs
    ctx.save_for_backward(q, p, core)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = scale * ((dy Sp) C^T) Sq."""
    q, p, core = ctx.saved_tensors
    p_side, inner, q_side = unpack(Resident(q, p, core, min(core.shape)))
    return (ctx.scale * (((grad.float() @ p_side) @ inner) @ q_side)).to(grad.dtype), None, None, None, None


side.register_autograd(_gradient, setup_context=_remember)


class EmbeddingLow:
    """A low-rank delta of an embedding (vocabulary, dim): rows are looked up in p, then pass the core and q."""

    def __init__(self, low: Low) -> None:
        self.low = low

    @property
    def nbytes(self) -> int:
        """Bytes of the residents."""
        return self.low.nbytes

    def move(self, device: torch.device) -> None:
        """Move the residents."""
        self.low.move(device)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return y + scale * dW[x] for ids x."""
        for part in self.low.parts:
            picked = part.p[:, x.reshape(-1)]
            rows = (unpack_words(picked) if part.packed else picked.float()).t()
            q = unpack_words(part.q) if part.packed else part.q.float()
            y = y + (self.low.scale * scale * (rows @ part.core.t() @ q)).view(y.shape).to(y.dtype)
        return y


class ConvLow:
    """A low-rank delta of a convolution: a narrow one with the layer's own stride, then one of size 1."""

    def __init__(self, module: Any, a: Tensor, b: Tensor, scale: float) -> None:
        self.module, self.a, self.b, self.scale = module, a, b, scale  # a (r, in, *kernel), b (out, r)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.a.nbytes + self.b.nbytes

    def move(self, device: torch.device) -> None:
        """Move the factors."""
        self.a, self.b = self.a.to(device), self.b.to(device)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return y + scale * the convolution with dW."""
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.a.dim() - 3]
        c = self.module
        h = conv(x.to(self.a.dtype), self.a, None, c.stride, c.padding, c.dilation)
        return y + (torch.einsum("or,br...->bo...", self.b, h) * (self.scale * scale)).to(y.dtype)


class Beside:
    """A sparse delta run beside the base."""

    def __init__(self, rows: sparse.Rows, scale: float) -> None:
        self.rows, self.scale = rows, scale

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values."""
        return self.rows.nbytes

    def move(self, device: torch.device) -> None:
        """Move positions and values."""
        r = self.rows
        self.rows = sparse.Rows(r.starts.to(device), r.columns.to(device), r.values.to(device), r.shape)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Through the kernel; gather, multiply and scatter where a gradient is wanted."""
        (m, n), r = self.rows.shape, self.rows
        if free(x, y):
            flat = y.reshape(-1, m)
            return sparse.side(x.reshape(-1, n), r, flat, self.scale * scale).view(y.shape)
        of = torch.repeat_interleave(torch.arange(m, device=x.device), (r.starts[1:] - r.starts[:-1]).long())
        wide = x[..., r.columns.long()].float() * (r.values.float() * (self.scale * scale))
        return y.float().index_add(-1, of, wide).to(y.dtype)


class Full:
    """A delta that is stored dense."""

    def __init__(self, weight: Tensor, scale: float) -> None:
        self.weight, self.scale = weight, scale

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.weight.nbytes

    def move(self, device: torch.device) -> None:
        """Move the matrix."""
        self.weight = self.weight.to(device)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return y + scale * dW x."""
        return y + (F.linear(x.to(self.weight.dtype), self.weight) * (self.scale * scale)).to(y.dtype)


class Product:
    """A Kronecker product: two small matrices around the input folded to a matrix."""

    def __init__(self, delta: Kron) -> None:
        self.left, self.right = delta.left.dense().float(), delta.right.dense().flatten(1).float()
        self.scale = delta.scale

    @property
    def nbytes(self) -> int:
        """Bytes of the two matrices."""
        return self.left.nbytes + self.right.nbytes

    def move(self, device: torch.device) -> None:
        """Move the two matrices."""
        self.left, self.right = self.left.to(device), self.right.to(device)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """kron(L, R) x is R X L^T on the (columns of L, columns of R) view of x."""
        folded = x.float().reshape(*x.shape[:-1], self.left.shape[1], self.right.shape[1])
        return y + ((self.left @ folded @ self.right.mT).flatten(-2) * (self.scale * scale)).to(y.dtype)


class Constant:
    """A change of the bias."""

    def __init__(self, vector: Tensor, scale: float) -> None:
        self.vector, self.scale = vector, scale

    @property
    def nbytes(self) -> int:
        """Bytes of the vector."""
        return self.vector.nbytes

    def move(self, device: torch.device) -> None:
        """Move the vector."""
        self.vector = self.vector.to(device)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Return y + scale * the vector."""
        return y + (self.vector * (self.scale * scale)).to(y.dtype)


def conv_low(module: Any, a: Tensor, b: Tensor, scale: float) -> ConvLow:
    """Return the branch of a convolution for factors a (r, in * kernel), b (out, r)."""
    kernel = module.weight.shape[1:]
    return ConvLow(module, a.reshape(-1, *kernel), b, scale)
