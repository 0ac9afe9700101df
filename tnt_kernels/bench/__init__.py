"""Speed, memory and accuracy against what people use now: ``python -m tnt_kernels bench``.

What is compared (``contenders``), on what (``problem``), whether it is right (``oracle``), how it is measured
(``measure``, ``memory``). The repository's ``benchmarks/`` measures more of it, with the same parts.
"""
