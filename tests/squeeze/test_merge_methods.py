"""Every merge method against the same method written densely on dW, in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merging import KEY, dense, inputs

from adaptc.delta import LowRank
from adaptc.squeeze.merge import Merge
from adaptc.squeeze.method import Options, Task

SHAPES = [(40, 56, (4, 4, 4)), (96, 64, (8, 3, 5)), (512, 512, (16, 12, 8))]


def truncated(w: np.ndarray, k: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def bases(ws: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors of [W1 ... WT] and right ones of [W1; ...; WT], those with a singular value.

    As eigenvectors of the dense sum of W W^T and of W^T W, which is fast enough for 512 x 512.
    """
    def leading(gram: np.ndarray) -> np.ndarray:
        d, v = np.linalg.eigh(gram)
        return v[:, ::-1][:, d[::-1] > 1e-12 * d[-1]]

    return leading(sum(w @ w.T for w in ws)), leading(sum(w.T @ w for w in ws)).T


def trim(x: np.ndarray, density: float) -> np.ndarray:
    out = np.zeros_like(x)
    for t in range(len(x)):
        flat = np.abs(x[t]).ravel()
        keep = np.argsort(-flat)[: int(density * flat.size)]
        out[t].ravel()[keep] = x[t].ravel()[keep]
    return out


def elect(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    wx = x * w.reshape(-1, *[1] * (x.ndim - 1))
    sign = np.where(wx.sum(0) >= 0, 1, -1)
    agree = np.sign(wx) == sign
    share = (agree * np.abs(w).reshape(-1, *[1] * (x.ndim - 1))).sum(0)
    return (wx * agree).sum(0) / np.where(share > 0, share, 1)


def on_core(ws, rule):
    u, vh = bases(ws)
    return u @ rule(np.stack([u.T @ w @ vh.T for w in ws])) @ vh


def knots(ws, w, density):
    u, _ = bases(ws)
    return u @ elect(trim(np.stack([u.T @ x for x in ws]), density), w)


def tsv(ws, w, k):
    us, ss, vs = [], [], []
    for t, x in enumerate(ws):
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        each = k // len(ws) + (t < k % len(ws))
        us.append(u[:, :each])
        ss.append(w[t] * s[:each])
        vs.append(vh[:each])
    (pu, _, qu), (pv, _, qv) = (np.linalg.svd(x, full_matrices=False) for x in (np.hstack(us), np.vstack(vs)))
    return (pu @ qu * np.concatenate(ss)) @ (pv @ qv)


def iso(ws, w, k):
    u, s, vh = np.linalg.svd(sum(a * x for a, x in zip(w, ws, strict=True)), full_matrices=False)
    return u[:, :k] @ vh[:k] * s[:k].mean()


def dropped(ws, x, density, seed):
    """x with the Bernoulli mask dare draws for this parameter: entries of both cores agree up to signs of rows."""
    task = Task(KEY, (), (1.0,), 1, Options(density=density, seed=seed))
    return x * (task.rng(0).random(x.shape) < density) / density


@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
@pytest.mark.parametrize("method", ["exact", "cat", "ties", "magnitude", "dare-linear", "dare-ties", "knots", "tsv",
                                    "iso"])
def test_equals_the_dense_method(method: str, m: int, n: int, ranks: tuple[int, ...]) -> None:
    adapters, k = inputs(m, n, ranks), 9
    ws, w = [dense(a) for a in adapters], np.array([0.5, 0.3, -0.4])
    signless = w / np.abs(w).sum()
    density = 0.4
    options = {} if method in ("exact", "cat", "tsv", "iso") else {"density": density}
    averaging = method in ("ties", "dare-ties", "knots")
    total = sum(a * x for a, x in zip(signless if averaging else w, ws, strict=True))
    expected = {
        "exact": lambda: truncated(total, k),
        "cat": lambda: total,
        "ties": lambda: truncated(on_core(ws, lambda x: elect(trim(x, density), signless)), k),
        "magnitude": lambda: truncated(on_core(ws, lambda x: np.tensordot(w, trim(x, density), 1)), k),
        "dare-linear": lambda: truncated(on_core(ws, lambda x: np.tensordot(w, dropped(ws, x, density, 3), 1)), k),
        "dare-ties": lambda: truncated(on_core(ws, lambda x: elect(dropped(ws, x, density, 3), signless)), k),
        "knots": lambda: truncated(knots(ws, signless, density), k),
        "tsv": lambda: tsv(ws, w, k),
        "iso": lambda: iso(ws, w, k),
    }[method]()
    rank = None if method == "cat" else k
    if method.startswith("dare"):
        options["seed"] = 3
    out = Merge(method=method, weights=tuple(w), rank=rank, **options)(adapters)
    made = out.adapter.deltas[KEY]
    assert isinstance(made, LowRank)
    got = made.dense().numpy()
    scale = np.linalg.norm(expected)
    assert np.linalg.norm(got - expected) <= 1e-6 * scale
    assert made.rank == (sum(ranks) if method == "cat" else k)
    departure = np.linalg.norm(got - total) / np.linalg.norm(total)
    assert out.rows[0].error == pytest.approx(departure, rel=1e-5, abs=2e-7)


def lego(ws, k, seed, weights):
    """LoRA-LEGO in the balanced gauge, densely: units of each SVD, signs along the maximum spanning tree, k-means."""
    from adaptc.squeeze.kmeans import cluster

    units = []
    for w, a in zip(ws, weights, strict=True):
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        r = int((s > 1e-10 * s[0]).sum())
        root = np.sqrt(len(ws) * abs(a) / np.abs(weights).sum())
        units += [np.concatenate([vh[j], np.sign(a) * u[:, j]]) * np.sqrt(s[j]) * root for j in range(r)]
    x = np.stack(units)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = np.abs(unit @ unit.T)
    placed = [int(np.linalg.norm(x, axis=1).argmax())]
    while len(placed) < len(x):
        rest = [j for j in range(len(x)) if j not in placed]
        i, j = max(((i, j) for i in placed for j in rest), key=lambda p: cosine[p])
        x[j] *= 1 if x[i] @ x[j] >= 0 else -1
        placed.append(j)
    n = ws[0].shape[1]
    labels = cluster(x, k, Task(KEY, (), (1.0,), 1, Options(seed=seed)).rng())
    out = np.zeros_like(ws[0])
    for c in range(k):
        members = x[labels == c]
        mu = members.mean(0)
        mu = mu * np.abs(members).max(1).mean() / np.abs(mu).max()
        out += np.sqrt(len(x) / len(ws) / k) * np.outer(mu[n:], mu[:n])
    return out


@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES[:2])
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (0.5, 1.0, -0.3)])
def test_lego_equals_the_dense_method(m: int, n: int, ranks: tuple[int, ...], weights: tuple[float, ...]) -> None:
    adapters = inputs(m, n, ranks)
    expected = lego([dense(a) for a in adapters], 6, 5, np.array(weights))
    got = dense(Merge(method="lego", rank=6, seed=5, weights=weights)(adapters).adapter)
    assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


def test_lego_raw_takes_the_factors_as_stored() -> None:
    """Two inputs with the same units in another order: clusters of two equal units, each its own mean."""
    d = inputs(20, 30, (4,))[0].deltas[KEY]
    assert isinstance(d, LowRank)
    shuffled = LowRank(d.a[[2, 0, 3, 1]], d.b[:, [2, 0, 3, 1]], None, d.scale, d.shape)
    first = inputs(20, 30, (4,))[0]
    out = Merge(method="lego", gauge="raw")([first, first.with_deltas({KEY: shuffled})]).adapter
    assert np.linalg.norm(dense(out) - dense(first)) <= 1e-6 * np.linalg.norm(dense(first))


def factors(a) -> tuple[np.ndarray, np.ndarray, float]:
    d = a.deltas[KEY]
    return d.b.double().numpy(), d.a.double().numpy(), d.scale


def test_fedavg_and_its_corrections() -> None:
    adapters, p = inputs(32, 24, (4, 4, 4)), np.array([0.5, 0.3, 0.2])
    bs, as_ = zip(*[(b * s**0.5, a * s**0.5) for b, a, s in map(factors, adapters)], strict=True)
    b, a = sum(x * w for x, w in zip(bs, p, strict=True)), sum(x * w for x, w in zip(as_, p, strict=True))
    total = sum(w * dense(x) for w, x in zip(p, adapters, strict=True))
    plain = dense(Merge(method="fedavg", weights=(5, 3, 2))(adapters).adapter)
    assert np.allclose(plain, b @ a, rtol=0, atol=1e-7)
    out = Merge(method="fedex", weights=(5, 3, 2))(adapters)
    assert np.linalg.norm(dense(out.adapter) - total) <= 1e-6 * np.linalg.norm(total)
    assert out.rows[0].rank_after == 12
    assert torch.allclose(out.adapter.deltas[KEY].b[:, :4], torch.from_numpy(b).float(), atol=1e-6)
    cut = dense(Merge(method="fedex", weights=(5, 3, 2), rank=7)(adapters).adapter)
    assert np.allclose(cut, b @ a + truncated(total - b @ a, 3), rtol=0, atol=1e-6)
    assert not out.rows[0].note
    alone = Merge(method="fedex", weights=(5, 3, 2), rank=4)(adapters)
    assert "without fedex's residual" in alone.rows[0].note
    assert np.allclose(dense(alone.adapter), b @ a, rtol=0, atol=1e-7)
    fair = dense(Merge(method="lora-fair", weights=(5, 3, 2))(adapters).adapter)
    gram = a @ a.T
    ridge = 0.01 * np.trace(gram) / 4 * np.eye(4)
    e = (total - b @ a) @ a.T @ np.linalg.inv(gram + ridge)
    assert np.allclose(fair, (b + e) @ a, rtol=0, atol=1e-7)
    assert np.linalg.norm(fair - total) < np.linalg.norm(plain - total)


@pytest.mark.parametrize("method", ["fedavg", "fedex", "lora-fair", "cat"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_shared_factor_makes_the_average_exact(method: str, side: str) -> None:
    adapters = inputs(32, 24, (4, 4, 4), torch.float32)
    first = adapters[0].deltas[KEY]
    assert isinstance(first, LowRank)
    same = [x.map(lambda k, d: LowRank(first.a if side == "a" else d.a, first.b if side == "b" else d.b, None, d.scale,
                                       d.shape)) for x in adapters]
    out = Merge(method=method)(same)
    total = sum(dense(x) for x in same) / 3
    assert np.linalg.norm(dense(out.adapter) - total) <= 1e-6 * np.linalg.norm(total)
    assert out.rows[0].rank_after == (12 if (method, side) == ("cat", "b") else 4)


def test_the_page_on_merging_names_every_method_as_the_code_does() -> None:
    from pathlib import Path

    from adaptc.squeeze.method import MERGES

    page = (Path(__file__).resolve().parents[2] / "docs" / "merging.md").read_text("utf8")
    for name, method in MERGES.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
        for fact in (method.space, method.exact, method.paper, method.avoid):
            assert f" {fact} |" in row, (name, fact)
