"""Hostile containers: name -> (what builds the file, what the message must say, the commands that must refuse it)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import torch
from boxes import Edit, bits, broken, code, entry, form, opened, origin, packed, raw, sound, stream, tensor, values

READERS = ("inspect", "verify", "compress", "decode")
DECODERS = ("verify", "compress")
ATTACKS: dict[str, tuple[Callable[[], bytes], str, tuple[str, ...]]] = {}


def attack(name: str, says: str, build: Edit | Callable[[], bytes], commands: tuple[str, ...] = READERS) -> None:
    """List an attack: an edit of the sound container, or a function that returns the file."""
    assert name not in ATTACKS
    edit = build.__code__.co_argcount == 2
    ATTACKS[name] = ((lambda: broken(build)) if edit else build, says, commands)  # type: ignore[arg-type,return-value,call-arg]


def told(manifest: Any) -> Callable[[], bytes]:
    """Return a builder of the sound tensors under another manifest, text as it is."""
    return lambda: packed(manifest, opened(sound())[1], sums=False)


def text(old: str, new: str) -> Callable[[], bytes]:
    """Return a builder of the sound container with text of its manifest replaced."""
    def build() -> bytes:
        manifest, tensors = opened(sound())
        whole = json.dumps(manifest)
        assert old in whole
        return packed(whole.replace(old, new, 1), tensors)

    return build


def drop(name: str) -> Edit:
    return lambda m, t: t.pop(name)


def flip(t: torch.Tensor) -> torch.Tensor:
    out = t.clone().reshape(-1)
    out.view(torch.uint8)[len(out) // 2] ^= 0x55
    return out.reshape(t.shape)


# Bytes
attack("bit-flipped-in-a-factor", "does not match its checksum", lambda: broken(stream("g0.0", flip), sums=False))
attack("bit-flipped-in-the-payload", "does not match its checksum",
       lambda: broken(stream("payload.0", flip), sums=False))
attack("bit-flipped-in-the-index", "does not match its checksum", lambda: broken(stream("index.1", flip), sums=False))
attack("trailing-bytes", "belong to nothing", lambda: sound() + b"\0" * 9)
attack("cut-below-the-payload", "truncated", lambda: sound()[:6000])
attack("cut-in-the-manifest", "truncated", lambda: sound()[:900])
attack("tensor-missing", "does not hold", drop("carried.0"))
attack("payload-missing", "does not hold", drop("payload.1"))
attack("index-missing", "does not hold", drop("index.0"))
attack("origin-missing", "does not hold", drop("origin"))
attack("tensor-smuggled-in", "not named in the manifest", lambda m, t: t.update({"sleeper": raw(b"x")}))
attack("tensor-smuggled-into-a-group", "not named in its form", lambda m, t: t.update({"g2.1": torch.ones(1, 4)}))
attack("checksum-left-out", "disagree about tensor", lambda: broken(lambda m, t: m["sums"].pop("g0.0"), sums=False))
attack("checksums-are-a-list", "sums is no dict", lambda: broken(values(sums=[]), sums=False))
attack("checksums-gone", "no checksums", lambda: broken(lambda m, t: m.pop("sums"), sums=False))
# Manifest
attack("version-from-the-future", "newer than 1", values(format=2))
attack("version-true", "no format version", values(format=True))
attack("version-zero", "no format version", values(format=0))
attack("manifest-no-json", "not JSON", told("{'format': 1}"))
attack("manifest-a-list", "no format version", told("[1]"))
attack("manifest-100000-deep", "not JSON", told('{"format": 1, "codes": ' + "[" * 100_000 + "]" * 100_000 + "}"))
attack("manifest-number-of-10000-digits", "not JSON", told('{"format": 1' + "0" * 10_000 + "}"))
attack("manifest-names-a-field-twice", "twice", text('"codes"', '"format": 1, "codes"'))
attack("manifest-unknown-field", "does not know", values(run="rm -rf /"))
attack("groups-are-a-number", "groups is no list", values(groups=3))
attack("base-is-a-number", "base is no str", values(base=7))
attack("fingerprint-is-no-digest", "not 16 hex digits", values(fingerprint="0123"))
attack("history-garbage", "history has the step", values(history=[{"spec": 1}]))
attack("history-of-wrong-types", "history has the step", values(history=[
    {"spec": "x", "version": "1", "nbytes_before": "2", "nbytes_after": 1, "error": None}]))
# Names
attack("names-without-end", "more than", entry("core", modules=["a.{0-131071}.{0-131071}"]))
attack("names-of-ten-billion", "endless range", code(0, modules=[["a.{0-9999999}", [12, 16]]]))
attack("names-by-many-templates", "more than", code(0, modules=[[f"{i}.{{0-9999}}", [12, 16]] for i in range(50)]),
       ("verify",))
attack("names-of-a-megabyte-each", "more than", entry("core", modules=["x" * 2**20 + "{0-9999}"]))
attack("name-of-a-megabyte", "characters, allowed", code(0, modules=[["x" * 2**20, [12, 16]]]))
attack("name-with-escape-codes", "control characters", code(0, modules=[["\x1b[2J\n{a,b,c}", [12, 16]]]))
attack("name-half-surrogate", "control characters", code(0, modules=[["\ud800{a,b,c}", [12, 16]]]))
attack("name-empty", "0 characters", entry("core", modules=[""]))
attack("name-is-a-number", "not a string", entry("core", modules=[5]))
attack("carried-name-with-escape-codes", "control characters", values(extra={"\x1b[31m": "carried.2"}))
attack("brace-left-open", "not closed", entry("core", modules=["core.{weight"]))
attack("module-twice-in-a-code", "twice", code(0, modules=[["model.{d0,d0,d2}.weight", [12, 16]]]))
attack("module-twice-across-codes", "twice", code(0, modules=[["model.{r0,d1,d2}.weight", [12, 16]]]))
attack("module-in-a-code-and-a-group", "twice", entry("core", modules=["model.d0.weight"]))
attack("module-in-two-groups", "twice", entry("core", modules=["dense.weight"]))
attack("tensor-named-twice", "twice", values(extra={"state": "carried.2", "more": "carried.2"}))
# Shapes
for number, shape in enumerate(([2**31, 2**31], [0, 16], [-12, -16], [12.0, 16], [True, 192], "12x16", [], [12] * 9,
                                [2**24, 2**24])):
    attack(f"shape-{number}", "manifest has shape", form("dense", lambda f, s=shape: f.update(shape=s)))
    attack(f"shape-of-a-code-{number}", "manifest has shape",
           code(0, modules=[["model.{d0,d1,d2}.weight", shape]]))
attack("shape-of-another-size", "do not make shape", form("core", lambda f: f.update(shape=[12, 17])))
attack("shape-of-codes-that-are-not-there", "payload has", code(0, modules=[["model.{d0,d1,d2}.weight", [12, 15]]]))
attack("modules-that-are-not-there", "for 2 modules", entry("core", modules=["core.weight", "core2.weight"]))
attack("sparse-of-many-gigabytes", "outside of shape", form("sparse", lambda f: f.update(shape=[1, 2])))
# Codes
attack("codec-unknown", "is not known", code(0, codec="zstd"))
attack("codec-for-factors-as-a-code", "no code of many modules", code(0, codec="nf4"))
attack("codec-config-is-a-list", "no code of many modules", code(0, config=[1]))
attack("rd-with-a-config", "it takes none", code(1, config={"step": 0.1}))
attack("directions-of-integers", "dtype", code(0, config={"dtype": "I32", "scale": 1.0}))
attack("directions-scales-too-few", "2 multipliers for 3 modules", code(0, config={"dtype": "F32", "scale": [1, 2]}))
attack("directions-scale-nan", "finite", text('"scale": 0.5}', '"scale": NaN}'))
attack("directions-scale-1e999", "finite", text('"scale": 0.5}', '"scale": 1e999}'))
attack("directions-scale-text", "finite", code(0, config={"dtype": "F32", "scale": "0.5"}))
attack("directions-of-module-999", "module 999 of 3", stream("index.0", lambda t: torch.cat([
    t, torch.tensor([999 % 256, 999 // 256, 0, 0], dtype=torch.uint8)])))
attack("directions-column-twice", "twice", stream("index.0", lambda t: torch.cat([t[:4], t[:4], t[8:]])))
attack("directions-column-left-out", "lacks a direction", stream("index.0", lambda t: t[:-4] + torch.tensor(
    [0, 0, 9, 0] * (len(t) // 4 - 1), dtype=torch.uint8)))
attack("directions-half-an-entry", "not whole entries", stream("index.0", lambda t: t[:-2]))
attack("directions-payload-too-long", "payload has", stream("payload.0", lambda t: torch.cat([t, t])))
attack("streams-of-floats", "not flat uint8", stream("index.0", lambda t: t.float()))
attack("streams-in-two-dimensions", "not flat uint8", stream("payload.1", lambda t: t[None]))
# The index of rate-distortion codes: four bits each of precision and five Rice parameters, then Rice codes
RICE = "0100" + "0000" * 5
attack("rd-index-empty", "too few for its own header", stream("index.1", lambda t: t[:0]))
attack("rd-index-of-zeros", "ends after", stream("index.1", lambda t: raw(bytes(1000))))
attack("rd-index-of-ones", "claims 32767 directions", stream("index.1", lambda t: raw(b"\xff" * 1000)))
attack("rd-index-cut", "ends after", stream("index.1", lambda t: t[:-3]))
attack("rd-index-too-long", "left over", stream("index.1", lambda t: torch.cat([t, t])))
attack("rd-absurd-directions", "claims", stream("index.1", lambda t: bits("0100", "1111" * 5, "0" * 4, "1" * 16)))
attack("rd-class-out-of-range", "has classes", stream("index.1", lambda t: bits(RICE, "01", "1", "01", "1", "0000")))
attack("rd-exponent-out-of-range", "has classes",
       stream("index.1", lambda t: bits(RICE, "01", "1", "1", "0" * 500, "1", "0000")))
attack("rd-stream-of-no-bytes", "claims 56 samples", lambda m, t: t.update({
    "index.1": bits(RICE, "01", "1", "1", "1", "0000", "0" * 11 + "1", "1", "1"), "payload.1": t["payload.1"][:0]}))
attack("rd-stream-of-minus-bytes", "has a stream of -",
       stream("index.1", lambda t: bits(RICE, "01", "1", "1", "1", "0000", "0" * 13 + "1", "1", "1")))
attack("rd-payload-too-long", "payload has", stream("payload.1", lambda t: torch.cat([t, t])))


def _far(m: dict[str, Any], t: dict[str, torch.Tensor]) -> None:
    """One direction of a module of 2^36 entries: 4096 streams, in an index of a few bytes."""
    m["codes"][1]["modules"] = [["far.weight", [2**12, 2**12, 2**12]]]
    t["index.1"] = bits(RICE, "01", "1", "1", "1", "0000", "1" * 8)
    t["payload.1"] = t["payload.1"][:0]


attack("rd-giant-shape-in-a-tiny-file", "ends after", _far)
attack("rd-streams-that-do-not-decode", "ends at bit", stream("payload.1", lambda t: t.flip(0)))
# Forms
for kind in ("shell", "coded", 3, None, {"a": 1}):
    attack(f"form-of-kind-{kind}", "no code holds" if kind == "coded" else "kind",
           entry("core", form={"kind": kind, "shape": [12, 16]}))
attack("form-is-text", "no object", entry("core", form="lowrank"))
attack("form-unknown-field", "does not know", form("core", lambda f: f.update(run="x")))
attack("form-lacks-a-factor", "malformed", form("core", lambda f: f.pop("b")))
for number in (7, -1, True, 1.0, "0", None):
    attack(f"form-names-tensor-{number}", "names tensor", form("core", lambda f, n=number: f.update(a=n)))
attack("form-names-a-tensor-twice", "twice", form("core", lambda f: f.update(b=0)))
attack("form-names-multiplier-7", "multiplier", form("core", lambda f: f.update(scale=7)))
attack("form-in-form-in-form", "deeper than", lambda m, t: _deep(m, 40))
attack("form-10000-deep", "not JSON", lambda: _very_deep())
attack("form-ranks-disagree", "do not share a rank", tensor("dora", 1, lambda t: t[:, :2]))
attack("form-core-disagrees", "does not join", tensor("core", 2, lambda t: t[:, :2]))
attack("form-factors-of-integers", "no floats", tensor("core", 0, lambda t: t.int()))
attack("form-factors-of-one-dimension", "no pair of matrices", tensor("core", 0, lambda t: t.flatten(1)))
attack("form-hadamard-of-dense", "lies where none may", entry("dense", form={
    "kind": "hadamard", "shape": [12, 16], "left": {"kind": "dense", "weight": 0, "shape": [12, 16]}, "right": {}}))
attack("form-hadamard-of-other-shape", "do not make shape", form("had", lambda f: f["left"].update(shape=[16, 12])))
attack("form-kron-lies", "makes (12, 16)", form("kron", lambda f: f.update(shape=[16, 12])))
attack("form-sum-of-nothing", "not a list of forms", form("sum", lambda f: f.update(terms=[])))
attack("form-sum-of-other-shapes", "do not make shape", form("sum", lambda f: f["terms"][0].update(shape=[16, 12])))
attack("form-needs-a-base-inside", "inside another form", entry("sum", form={
    "kind": "sum", "shape": [12, 16], "terms": [
        {"kind": "needsbase", "name": "dora", "config": {}, "tensors": {}, "shape": [12, 16]}]}))
attack("form-unknown-change-of-base", "is not known", form("dora", lambda f: f.update(name="eval")))
attack("form-config-is-text", "no objects", form("dora", lambda f: f.update(config="axis")))
attack("sparse-index-outside", "outside of shape", tensor("sparse", 0, lambda t: t + 180))
attack("sparse-index-negative", "outside of shape", tensor("sparse", 0, lambda t: t - 1))
attack("sparse-index-twice", "twice", tensor("sparse", 0, lambda t: t * 0))
attack("sparse-not-sorted", "not sorted", tensor("sparse", 0, lambda t: t.flip(1)))
attack("sparse-indices-of-int32", "expected int64", tensor("sparse", 0, lambda t: t.int()))
attack("sparse-values-too-few", "expected int64", tensor("sparse", 1, lambda t: t[:, :2]))
attack("multipliers-too-few", "multipliers for", entry("core", scales=[[1.0, 2.0]]))
attack("multiplier-text", "not a finite number", entry("core", scales=["1.0"]))
attack("multiplier-true", "not a finite number", entry("core", scales=[True]))
attack("multiplier-1e999", "not a finite number", text('"scales": [1.0]', '"scales": [1e999]'))
# Codes of single factors
attack("factor-codec-unknown", "is not known", form("nf4", lambda f: f["a"].update(codec="nf3")))
attack("factor-codec-of-many-modules", "no single factors", form("nf4", lambda f: f["a"].update(codec="rd")))
attack("factor-config-lies", "does not take config", form("nf4", lambda f: f["a"].update(config={"transpose": "yes"})))
attack("factor-config-unknown", "does not take config", form("nf4", lambda f: f["a"].update(config={"bits": 2})))
attack("factor-config-a-list", "does not take config", form("nf4", lambda f: f["a"].update(config=[])))
attack("factor-width-5", "does not take config", form("affine", lambda f: f["a"]["config"].update(width=5)))
attack("factor-group-0", "does not take config", form("affine", lambda f: f["a"]["config"].update(group=0)))
attack("factor-dtype-of-integers", "do not make a factor", form("nf4", lambda f: f["a"].update(dtype="I64")))
attack("factor-of-terabytes", "do not make a factor", form("nf4", lambda f: f["a"].update(shape=[2**15, 2**20])))
attack("factor-larger-than-its-codes", "stream codes", form("nf4", lambda f: f["a"].update(shape=[2**10, 2**10])))
attack("factor-group-larger-than-its-codes", "stream", form("affine", lambda f: f["a"].update(shape=[2**20, 1])))
attack("factor-in-three-dimensions", "codes a matrix", form("nf4", lambda f: f["a"].update(shape=[4, 12, 8])))
attack("factor-stream-missing", "is missing", form("affine", lambda f: f["a"]["streams"].pop("low")))
attack("factor-stream-of-floats", "expected uint8", tensor("nf4", 0, lambda t: t.float()))
attack("factor-stream-too-short", "expected", tensor("fp8", 1, lambda t: t[:, :-1]))
attack("factor-codes-out-of-range", "hold NaN", tensor("fp8", 0, lambda t: t * 0 + 127), (*DECODERS, "decode"))
attack("fourier-of-terabytes", "do not make a factor", form("fourier", lambda f: (
    f.update(shape=[2**18, 2**18]), f["weight"].update(shape=[2**18, 2**18]))))
attack("fourier-index-outside", "outside of shape", tensor("fourier", 0, lambda t: t + 1000))
# Codes of positions
attack("places-of-another-size", "are no positions", form("places", lambda f: f["indices"]["config"].update(size=191)))
attack("places-as-floats", "are no positions", form("places", lambda f: f["indices"].update(dtype="F32")))
attack("places-with-a-span-of-nothing", "does not take config", form("places", lambda f: (
    f["indices"]["config"].update(span=0))))
attack("places-of-petabytes", "table has", form("places", lambda f: f["indices"]["config"].update(size=2**50, span=1)))
attack("places-more-than-bits", "claims more", tensor("places", 0, lambda t: t * 0 + 200))
attack("places-of-no-modulus", "has modulus", tensor("places", 0, lambda t: torch.tensor([[64, 0, t[0, 2]]]).int()))
attack("places-without-bits", "expected 64 in", tensor("places", 1, lambda t: t[:, :-1]))
attack("places-too-few-values", "have values", tensor("places", 2, lambda t: t[:, :-1]))
attack("places-of-zeros", "ends after", tensor("places", 1, lambda t: t * 0), ("verify", "decode"))
attack("places-of-ones", "left over", tensor("places", 1, lambda t: t * 0 + 255), ("verify", "decode"))
attack("places-as-a-factor", "do not make a factor", form("places", lambda f: (
    f.update(kind="dense", weight=f.pop("indices")), f.pop("values"))))
# Carried tensors
attack("rows-too-few", "row numbers for", lambda m, t: m["replaced"]["emb.weight"].update(rows=[3]))
attack("rows-negative", "distinct and whole", lambda m, t: m["replaced"]["emb.weight"].update(rows=[-3, 3]))
attack("rows-twice", "distinct and whole", lambda m, t: m["replaced"]["emb.weight"].update(rows=[3, 3]))
attack("rows-text", "distinct and whole", lambda m, t: m["replaced"]["emb.weight"].update(rows="39"))
attack("rows-of-a-missing-tensor", "does not hold", lambda m, t: m["replaced"]["emb.weight"].update(values="carried.9"))
attack("carried-tensor-is-a-list", "does not hold", values(extra={"state": ["carried.2"]}))
# Origin
attack("origin-bomb-of-64-mebibytes", "inflates to more", stream("origin", lambda t: raw(_bomb())))
attack("origin-cut", "does not end", stream("origin", lambda t: t[:-5]))
attack("origin-with-more-behind", "does not end", stream("origin", lambda t: torch.cat([t, t])))
attack("origin-not-deflated", "no deflated text", stream("origin", lambda t: t.flip(0)))
attack("origin-no-json", "not JSON", stream("origin", lambda t: raw(zlib.compress(b"dialect"))))
attack("origin-not-utf-8", "malformed", stream("origin", lambda t: raw(zlib.compress(b'{"dialect": "\xff"}'))))
attack("origin-a-list", "not a JSON object", origin(lambda o: ["peft"]))
attack("origin-100000-deep", "not JSON", stream("origin", lambda t: raw(zlib.compress(b"[" * 100_000))))
attack("origin-without-dialect", "malformed", origin(lambda o: o.pop("dialect") and None))
attack("origin-dialect-a-number", "no text", origin(lambda o: o.update(dialect=3)))
attack("origin-config-text", "no object", origin(lambda o: o.update(config="x")))
attack("origin-names-a-list", "malformed", origin(lambda o: o.update(names=["x"])))
attack("origin-layout-of-numbers", "no text", origin(lambda o: o.update(layout={"x": 1})))
attack("origin-notes-of-numbers", "no text", origin(lambda o: o.update(notes=[1])))
attack("origin-half-surrogate", "surrogate", origin(lambda o: o.update(notes=["\ud800"])))
# Values
NAN = float("nan")
attack("nan-in-a-factor", "finite", tensor("core", 0, lambda t: t * NAN), DECODERS)
attack("nan-in-a-direction", "finite", stream("payload.0", lambda t: t * 0 + 255), DECODERS)
attack("nan-in-a-scale-of-codes", "finite", tensor("nf4", 2, lambda t: t * NAN), DECODERS)
attack("infinite-magnitude", "finite", tensor("dora", 0, lambda t: t / 0), ("verify",))
attack("nan-in-a-head", "finite", stream("carried.0", lambda t: t * NAN), ("verify",))


def _bomb() -> bytes:
    """Return 64 mebibytes of spaces, deflated to 64 kibibytes."""
    squeeze, block = zlib.compressobj(), b" " * 2**20
    return b"".join([*(squeeze.compress(block) for _ in range(64)), squeeze.flush()])


def _deep(m: dict[str, Any], depth: int) -> None:
    made: dict[str, Any] = {"kind": "dense", "weight": 0, "shape": [12, 16]}
    for _ in range(depth):
        made = {"kind": "sum", "terms": [made], "shape": [12, 16]}
    entry("dense", form=made)(m, {})


def _very_deep() -> bytes:
    manifest, tensors = opened(sound())
    middle = json.dumps(manifest).replace('"weight": 0', '"weight": ' + '{"a":' * 10_000 + "1" + "}" * 10_000, 1)
    return packed(middle, tensors)
