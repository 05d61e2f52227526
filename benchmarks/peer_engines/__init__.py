"""What ``benchmarks/peers.py`` is made of.

``engines``: every engine by name, and how it is started; ``process``: a child that can be held while others run;
``served``: engines behind HTTP; ``hf``, ``hf_side``: transformers, which has a process of its own; ``gguf``: the model as llama.cpp
reads it; ``workload``: what is sent; ``measure``: rounds, rates and whether the answers are right; ``report``: table and plot.
"""
