"""Triton, or a stand-in where it is not installed, so that every op file imports anywhere (macOS, CPU-only wheels)."""

try:
    import triton
    import triton.language as tl
    from triton import knobs

    HAS_TRITON = True
    # read once: Triton decides at decoration time whether a kernel is interpreted
    INTERPRET = triton.knobs.runtime.interpret
except ImportError:

    class _Absent:
        """Takes the place of ``triton`` and ``tl`` while kernels are being defined; no launch ever reaches it."""

        def __getattr__(self, name):
            return _Absent()

        def __call__(self, *args, **kwargs):
            return _Absent()

    triton, tl, knobs = _Absent(), _Absent(), _Absent()
    HAS_TRITON = INTERPRET = False

__all__ = ["HAS_TRITON", "INTERPRET", "knobs", "tl", "triton"]
