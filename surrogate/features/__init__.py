"""Encoders, one file each: texts in, a matrix of features out.

Contract of an encoder (a keyword-only dataclass whose `plugin_name` is its file's name):

- `frozen: ClassVar[bool]`: whether the features depend on the text and the options alone. If so they are
  computed once per text_id; if not, `key()` carries the checkpoint they were computed at.
- `needs_model: ClassVar[bool]`: whether it must be given a language model.
- `needs_words: ClassVar[bool]`, optional: True if it cannot read texts that are token ids.
- `encode(texts) -> (N, D) float32`: finite, the same row for the same text whatever stands beside it
  (beyond rounding); `(0, D)` for no texts.
- `key() -> str`: names the encoder and its options; usable as a folder name.
- `fingerprint() -> str`: identifies everything the features depend on, weights included.
- `flops(texts) -> float`: floating-point operations that `encode(texts)` counts for; 0 where they are
  negligible beside any language model.
- `feature_names: tuple[str, ...]`, optional: what each of the D columns is, where that can be said.

Options that change speed only (batch size, device) are left out of `key()` and `fingerprint()`.
`surrogate.feature_cache` keeps what encoders computed.
"""
