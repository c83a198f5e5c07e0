"""Proof that a cut model is the whole model."""

from bireme.verify.certificate import (
    TOLERANCES,
    Certificate,
    Departure,
    certificate_json,
    certificate_name,
    certificate_text,
)
from bireme.verify.comparison import uncut_reference, verify
from bireme.verify.oracle import transformers_reference
from bireme.verify.sequences import Reference, Sequences, lead

__all__ = [
    "TOLERANCES",
    "Certificate",
    "Departure",
    "Reference",
    "Sequences",
    "certificate_json",
    "certificate_name",
    "certificate_text",
    "lead",
    "transformers_reference",
    "uncut_reference",
    "verify",
]
