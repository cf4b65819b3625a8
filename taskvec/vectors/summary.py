"""The summary of a vector as a dictionary of plain values."""

from __future__ import annotations

from typing import Any

from taskvec_formats import Form, Identity

from .carried import recorded
from .source import Vector


def summary_of(vector: Vector) -> dict[str, Any]:
    """Summarise a vector as a dictionary of plain values, ready for JSON.

    Args:
        vector: A vector or a patch. The entries of a patch are the elements that it replaces. The entries of a vector
            that is computed when it is read are not counted: their numbers are None.

    Returns:
        Kind, base, tuned, numbers of entries, replaced elements and eligible weights, density, the side files that the
        vector carries and what it does not carry, provenance, and a list of tensors.
    """
    counts = {
        name: (spec.replaced if vector.kind == "patch" else spec.entries) if vector.is_stored else None
        for name, spec in vector.specs.items()
    }
    entries = sum(count or 0 for count in counts.values()) if vector.is_stored else None
    return {
        "kind": vector.kind,
        "entries": entries,
        "replaced": sum(spec.replaced for spec in vector.specs.values()) if vector.is_stored else None,
        "eligible": vector.eligible,
        "density": _share(entries, vector.eligible),
        "base": _identity(vector.base),
        "tuned": vector.header.tuned and _identity(vector.header.tuned),
        "removed": list(vector.header.removed),
        "side_files": [file.name for file in vector.header.files or () if file.blob],
        "not_carried": list(recorded(vector.provenance)),
        "provenance": vector.provenance,
        "tensors": [
            {
                "name": spec.name,
                "shape": list(spec.shape),
                "dtype": spec.dtype.name,
                "origin": spec.origin and _form(spec.origin),
                "entries": counts[spec.name],
                "density": _share(counts[spec.name], spec.size),
            }
            for spec in vector.specs.values()
        ],
    }


def _share(entries: int | None, weights: int) -> float | None:
    return None if entries is None else entries / weights if weights else 0.0


def _identity(identity: Identity) -> dict[str, str]:
    return {"name": identity.name, "fingerprint": identity.fingerprint}


def _form(form: Form) -> dict[str, Any]:
    return {"shape": list(form.shape), "dtype": form.dtype.name}
