"""A complete reader of `.lota` 1.0 files by docs/format.md (§), with nothing of taskvec: prints what FILE changes as JSON.
Usage: python minimal_reader.py FILE.lota [BASE.safetensors]. Whatever is wrong with a file ends in an exception."""

import hashlib, json, math, re, struct, sys

import numpy as np, zstandard
from pcodec.wrapped import FileDecompressor

MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
NAMES = {8: "F64 C64 I64 U64", 4: "F32 I32 U32", 2: "F16 BF16 I16 U16", 1: "F8_E4M3 F8_E5M2 F8_E8M0 I8 U8 BOOL"}
SIZE = {name: size for size, names in NAMES.items() for name in names.split()}

def need(condition, what):
    if not condition:
        raise ValueError(what)

def unique(pairs):
    need(len(dict(pairs)) == len(pairs), "a key occurs twice")
    return dict(pairs)

def parse(text, form, later):  # §2, §3, §9
    value = json.loads(text, object_pairs_hook=unique)
    need(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() and fits(value, form, later), "its form")
    return value

def fits(v, form, later):  # form: a type, a pattern, None, (one of), {keys}, [any number of] or [items]
    if isinstance(form, tuple):
        return any(fits(v, one, later) for one in form)
    if type(v) is not type(form) or v is None:
        return type(v) is form or v is form
    if isinstance(form, str):
        return re.fullmatch(form, v)
    if isinstance(form, dict):
        return form.keys() <= v.keys() and (later or len(v) == len(form)) and all(fits(v[k], form[k], later) for k in form)
    forms = form * len(v) if len(form) == 1 else form
    return len(v) == len(forms) and all(map(fits, v, forms, [later] * len(v)))

SHA256, HALF, SHORT, DTYPE = "[0-9a-f]{64}", "[0-9a-f]{32}", ("[0-9a-f]{16}", None), "|".join(SIZE)
STATE, ENTRIES = {"name": str, "fingerprint": SHA256}, ([int, str, int, str, int], None)
NAME, PLAIN = r"[^\x00-\x1f\x7f-\x9f]*", r"(?!\.\.?$)[^/\\\x00-\x1f\x7f-\x9f]{1,255}"
WEIGHTS = r"(?i:.*\.(safetensors|bin|pth?|ckpt|gg(uf|ml)|h5|hdf5|keras|msgpack|onnx(_data)?|ot|pdparams|tflite|npz|pkl|pickle|joblib|lota)(\.index(\.[^.]+)?\.json)?$|adapter_config\.json$)"
SIDE, BLOB, INDEX = rf"model\.safetensors\.index\.json|(?!{WEIGHTS}){PLAIN}", [int, int, HALF], {"size": int, "sha256": SHA256}
TOP = {"version": r"1\.\d{1,6}", "kind": "vector|patch", "base": STATE, "tuned": (STATE, None), "index": INDEX, "provenance": dict}
TENSOR = {"name": NAME, "dtype": DTYPE, "shape": [int], "origin": ("same", [DTYPE, [int]], None), "eligible": bool,
          "base": SHORT, "blocks": [([HALF, SHORT, SHORT, ENTRIES, ENTRIES], None)]}
FILES = {"shards": ([[rf"(?=.*\.safetensors$){PLAIN}", SHA256, BLOB]], None), "files": ([[SIDE, SHA256, (BLOB, None)]], None)}

def digest(data, expected, size):
    need(hashlib.sha256(data).hexdigest()[:size] == expected, "a digest does not match")

def open_safetensors(path):
    data = memoryview(np.fromfile(path, np.uint8))
    start = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(bytes(data[8:start]), object_pairs_hook=unique)
    metadata, end, tensors = header.pop("__metadata__", {}), 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (a, b), size = entry["data_offsets"], SIZE[entry["dtype"]] * math.prod(entry["shape"])
        need(a == end and b - a == size, f"{name} lies badly")
        end, tensors[name] = b, (entry["dtype"], entry["shape"], data[start + a : start + b])
    need(start + end == len(data), "data too long or too short")
    return metadata, tensors

def blob(stored, size):  # §4
    claimed = size if len(stored) == size else zstandard.frame_content_size(stored)
    need(claimed == size <= max(1 << 20, 256 * len(stored)), "blob")
    return bytes(stored) if len(stored) == size else zstandard.ZstdDecompressor().decompress(stored, size, allow_extra_data=False)

def split(data, parts):  # §5.1
    found = []
    for _ in range(parts - 1):
        at = next(n for n, byte in enumerate(data) if byte < 128) + 1
        end = at + sum((byte & 127) << 7 * n for n, byte in enumerate(data[:at]))
        need(end <= len(data), "stream too short")
        found, data = [*found, data[at:end]], data[end:]
    return [*found, data]

def numbers(data, n):  # §5.1
    if n == len(data) == 0:
        return np.empty(0, "u8")
    need(0 < n <= 1 << 24 and data[0] in (1, 2, 4, 8), "numbers")
    out, rest = np.empty(n, f"<u{data[0]}"), bytes(data[1:])
    file, header = FileDecompressor.new(rest)
    chunk, meta = file.chunk_decompressor(rest[header:], f"u{8 * data[0]}")
    progress, page = chunk.read_page_into(rest[header + meta :], n, out)
    need(progress.n_processed == n and progress.finished and header + meta + page == len(rest), "numbers")
    return out.astype(np.uint64)

def bitmap(data, n):
    need(not (found := np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype("u8"))[n:].any(), "unused bits")
    return found[:n]

def bits(data, widths):  # §5.1
    order, out = np.argsort(-widths, kind="stable"), np.zeros(len(widths), "u8")
    for low in range(0, int(widths.max(initial=0)), 8):
        whole = np.count_nonzero(widths >= low + 8)
        out[:whole] |= np.frombuffer(data[:whole], np.uint8).astype("u8") << np.uint64(low)
        data = data[whole:]
        for bit in range(low, low + 7):
            n = np.count_nonzero(widths > bit) - whole
            plane, data = bitmap(data[: (n + 7) // 8], n), data[(n + 7) // 8 :]
            out[whole : whole + n] |= plane << np.uint64(bit)
    need(not len(data), "bytes left over")
    return out[np.argsort(order)]

def mixture(data, classes):  # §5.1
    first, *streams, low = split(data, 10)
    _, counts = np.unique(classes, return_counts=True)
    shifts, groups = (np.repeat(part, counts) for part in np.divmod(numbers(first, len(counts)).astype(int), 8))
    top = np.zeros(len(classes), "u8")
    for group, stream in enumerate(streams):
        top[groups == group] = numbers(stream, np.count_nonzero(groups == group))
    need((shifts < 64).all() and (top <= 2**64 - 1 >> shifts.astype("u8")).all(), "number too large")
    return (top << shifts.astype("u8") | bits(low, shifts))[np.argsort(np.argsort(classes, kind="stable"))]

def exponent_classes(carriers, dtype):  # §5.1
    unsigned = carriers.astype("u8") & np.uint64((1 << 8 * SIZE[dtype] - 1) - 1)
    exponents = (unsigned >> np.uint64(MANTISSA[dtype])).astype(int) if dtype in MANTISSA else np.zeros(len(carriers), int)
    return np.maximum(0, exponents - max(0, int(exponents.max(initial=0)) - 23))

def positions(codec, data, n, cols, size, dtype, base):  # §5.2
    if codec == "gaps":
        found = (np.cumsum(numbers(data, n).astype(int) + 1) - 1).tolist()
    elif codec == "exponents":
        classes, (first, second) = exponent_classes(base, dtype), split(data, 2)
        sizes, counts = np.bincount(classes, minlength=24), numbers(first, 24).astype(int)
        need(dtype in MANTISSA and (counts <= sizes).all() and counts.sum() == n, "cells")
        means = [min(256 * int(s) // max(int(c), 1), 1 << 31) for s, c in zip(sizes, counts, strict=True)]
        gaps = mixture(second, np.repeat([max(m * m >> 16, 1).bit_length() - 1 for m in means], counts))
        need((gaps < size).all(), "gap")
        parts = [np.cumsum(part + 1) - 1 for part in np.split(gaps.astype(int), np.cumsum(counts)[:-1])]
        found = sorted(at for cell, part in enumerate(parts) for at in np.flatnonzero(classes == cell)[part].tolist())
    elif codec == "paper64":
        found, row, col, far = [], 0, 0, iter(np.frombuffer(data[4 * n :], "<u8").tolist())
        for word in np.frombuffer(data[: 4 * n], "<u4").tolist():
            down, across = word >> 12, word & 4095
            need(down < 4095 or word == 4095 << 12, "layer, module or escape")
            row, col = divmod(next(far), cols) if down == 4095 else (row + down, across if down else col + across)
            found.append(row * cols + col)
        need(next(far, None) is None, "escapes left over")
    else:
        need(codec == "plain", f"codec {codec}")
        found = np.frombuffer(data, "<u4" if size <= 1 << 32 else "<u8").tolist()
    need(len(found) == n and 0 <= found[0] and found[-1] < size and all(a < b for a, b in zip(found, found[1:])), "order")
    return found

def values(codec, data, at, width, dtype, base):  # §5.3
    if codec in ("packed", "plain"):
        found = numbers(data, len(at)) if codec == "packed" else np.frombuffer(data, f"<u{width}")
    elif codec == "floats":
        heads, zeros, rest = split(data, 3)
        heads, zeros = numbers(heads, len(at)), numbers(zeros, len(at))
        need((heads < 1 << 16).all() and (zeros <= 15).all() and width == 4, "head or zeros")
        rest = bits(rest, np.where(zeros == 15, 1, 15 - zeros.astype(int)))
        found = (rest & 1) << 31 | heads << 15 | np.where(zeros == 15, 0, (rest | 1) << zeros)
    else:
        need(codec == "steps" and width == SIZE[dtype] and base is not None, f"codec {codec}")
        old, cut, half, found = base[at], (len(at) + 7) // 8, 1 << 8 * width - 1, []
        down, beyond = bitmap(data[:cut], len(at)), mixture(data[cut:], exponent_classes(old, dtype))
        need((beyond < half).all(), "step")
        for b, d, m in zip(old.tolist(), down.tolist(), beyond.tolist()):
            order = b if dtype not in MANTISSA else b + half if b < half else 2 * half - 1 - b
            order = (order + (-m - 1 if d else m + 1)) % (2 * half)
            found.append(order if dtype not in MANTISSA else order - half if order >= half else 2 * half - 1 - order)
    need(len(found) == len(at) and all(int(value) < 1 << 8 * width for value in found), "values")
    return [int(value).to_bytes(width, "little").hex() for value in found]

def base_bits(tensor, base):  # §6
    dtype, shape = new = [tensor["dtype"], tensor["shape"]]
    bits, (old, old_shape) = np.zeros(shape, f"<u{SIZE[dtype]}"), new if tensor["origin"] == "same" else tensor["origin"] or new
    if tensor["origin"] and len(old_shape) == len(shape) and (old == dtype or {old, dtype} <= MANTISSA.keys()):
        corner = tuple(map(slice, map(min, shape, old_shape)))
        kept = np.frombuffer(base[tensor["name"]][2], f"<u{SIZE[old]}").reshape(old_shape)[corner]
        bits[corner] = kept if old == dtype else rounded(kept, old, dtype)
    return bits.reshape(-1)

def rounded(bits, old, new):  # §6; no 8-bit floats here
    value = (bits.astype("u4") << 16).view("f4") if old == "BF16" else np.ascontiguousarray(bits).view(f"f{SIZE[old]}")
    value = value if new == "F64" else value.astype("f4")
    word = value.view("u4") if new == "BF16" else value.astype(f"f{SIZE[new]}").view(f"u{SIZE[new]}")
    return np.where(np.isnan(value), 0, word + 32767 + (word >> 16 & 1) >> 16 if new == "BF16" else word)

def read_tensor(tensor, data, kind, base):  # §3, §4
    dtype, shape, found = tensor["dtype"], tensor["shape"], {"delta": [], "replacements": []}
    origin = tensor["origin"][1] if type(tensor["origin"]) is list else []
    need(all(len(s) <= 64 and min(s, default=0) >= 0 and math.prod(filter(None, s)) < 1 << 48 for s in (shape, origin)), "shape")
    cols, whole = shape[-1] if len(shape) > 1 else 1, math.prod(shape)
    step, old = max(1, (1 << 22) // max(cols, 1)) * cols, base_bits(tensor, base) if kind == "patch" else None
    for start, (check, _, _, *parts) in ((a, b) for a, b in zip(range(0, whole, max(step, 1)), tensor["blocks"], strict=True) if b):
        size, stored = min(step, whole - start), sum(part[2] + part[4] for part in parts if part)
        need(any(parts) and stored <= len(data), "block")
        digest(data[:stored], check, 32)
        beside = None if old is None else old[start : start + size]
        for what, width, (n, codec, length, value_codec, value_length) in filter(all, zip(found, (4, SIZE[dtype]), parts)):
            need(0 < n <= size and (what != "delta" or kind == "vector" and dtype in MANTISSA), "count or kind")
            at = positions(codec, data[:length], n, cols, size, dtype, beside)
            new = values(value_codec, data[length : length + value_length], at, width, dtype, beside)
            need(what != "delta" or np.isfinite(np.frombuffer(bytes.fromhex("".join(new)), "<f4")).all(), "a delta is no number")
            found[what] += [[start + position, value] for position, value in zip(at, new, strict=True)]
            data = data[length + value_length :]
    return found, data

def read(path, base_path=None):  # §1 to §4
    metadata, tensors = open_safetensors(path)
    need(sorted(tensors) == ["taskvec.blocks", "taskvec.index"] and all(d == "U8" and len(s) == 1 for d, s, _ in tensors.values()), "not the two tensors, U8 [n]")
    index, data = tensors["taskvec.index"][2], tensors["taskvec.blocks"][2]
    digest(metadata["taskvec"].encode(), metadata["taskvec.sha256"], 64)
    top = parse(metadata["taskvec"], TOP, later := json.loads(metadata["taskvec"])["version"] != "1.0")
    digest(index, top["index"]["sha256"], 64)
    parts = parse(blob(index, min(top["index"]["size"], 1 << 26)), {"tensors": [TENSOR], "removed": [NAME], **FILES}, later)
    shards, files = ([file[0] for file in parts[key] or []] for key in ("shards", "files"))
    for names in ([tensor["name"] for tensor in parts["tensors"]], parts["removed"], sorted(shards), files):
        need(names == sorted(set(names)), "names out of order")
    base, content = open_safetensors(base_path)[1] if base_path else {}, {}
    for tensor in parts["tensors"]:
        content[tensor["name"]], data = read_tensor(tensor, data, top["kind"], base)
    for _, sha256, (stored, size, check) in filter(all, (parts["shards"] or []) + (parts["files"] or [])):
        digest(data[:stored] if stored <= min(size, len(data)) else b"", check, 32)
        digest(blob(data[:stored], size), sha256, 64)
        data = data[stored:]
    need(not len(data), "bytes left over")
    return {"kind": top["kind"], "removed": parts["removed"], "tensors": content}

if __name__ == "__main__":
    json.dump(read(*sys.argv[1:]), sys.stdout)
