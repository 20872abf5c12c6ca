"""The measurements behind ``vit-fast bench``, ``vit-fast tune``, ``make gpu`` and the files of ``bench/``.

===========  ==========================================================================================================
roofline     the work of each operation, and the floors that follow from it
cases        the calls that are timed: every operation with its variants, at the shapes of the published models
timing       how a time is taken: by turns on CPUs, by device events and CUDA graphs on GPUs; the ceilings
operations   an operation's implementations on one case: checked, then timed
models       whole models, ours and other packages', forward and training step: checked, then timed
peers        other packages' models with our weights
overhead     what a call through a public operation costs before anything is computed
launches     other launch configurations of the Triton kernels
record       the JSON file of a run, and the machine that it was made on
suite        what a run measures, in which order, and how long that takes
tables       rows as text
compare      two files against each other
page         rows as one HTML file; `drawing` its plots
command      ``vit-fast bench``
===========  ==========================================================================================================

Nothing here is imported by ``import vit_fast``.
"""
