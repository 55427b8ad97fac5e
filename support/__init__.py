"""Formats and plumbing, in seven rooms. A reader of the tutorial may skip this folder; nothing here
imports the four files, and a room imports only rooms above it in this list.

system/        console: errors as one line, progress, provenance; signals: Ctrl-C and SIGTERM;
               whole_files: files that are whole or not there; bad_input: what is refused;
               ahead: items made on a thread before they are asked for
huggingface/   config, checkpoint: config.json and safetensors; yarn: a type of RoPE;
               folders, hub: a model by its folder or name; hashes: which model it is; tokenizer
data/          text: files as documents of tokens; segments: where sentences end; toy: the toy
               task; sources: what a run reads; other_methods: positions of pose and others
memory/        activations, optimizer: the levers; kernels: attention on a GPU, what is compiled;
               count: bytes and FLOPs; machine: what is there; choose: levers that fit;
               table: `--plan`
runs/          settings, flags, checks: what train.py is told; run_folder: out/; metrics, analysis:
               files in it; export: samples as files
needles/       tasks: what is hidden, in which words; haystack; settings: what to do, who is judged;
               results: needle.jsonl; intervals, summary: what they say; report, figures; cost
explain/       command: `python recipe.py` and what it says; figure: what it draws; distances: what
               it counts
"""
