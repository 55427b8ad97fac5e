"""Formats and plumbing, in seven rooms. A reader of the tutorial may skip this folder; nothing here
imports the four files, and a room imports only rooms above it in this list.

system/        what every command shares
    console        errors as one line, progress with ETA, provenance
    signals        Ctrl-C, SIGTERM and SIGHUP, and what they must not cut in two
    whole_files    files and folders that are whole or not there
    bad_input      the error for what a user can correct
    ahead          items made on a thread before they are asked for

huggingface/   model folders
    config         config.json, read with checks and written for every reader
    checkpoint     weights in safetensors, one tensor at a time
    yarn           a way to scale RoPE
    folders        a whole folder: read, write, merge
    hub            a folder by its name on the hub
    hashes         which model it is
    tokenizer      ids equal to those of `tokenizers`

data/          texts
    text           files as documents of tokens
    segments       where sentences end
    toy            the toy's task
    sources        what a run reads
    other_methods  positions of PoSE, CREAM and others

memory/        what a run needs
    activations    what is kept for the backward pass, and where
    optimizer      AdamW on the device, on the host, in 8 bits
    kernels        attention's kernels, and what is compiled
    count          FLOPs and bytes of a model's shape
    machine        memory, disk and speed that are there
    choose         the levers that fit
    table          `--plan`

runs/          train.py's plumbing
    settings       its flags
    flags          flags that are fields of a dataclass
    checks         which flags make no sense
    run_folder     out/ and resuming
    metrics        a line a step
    analysis       impactful.json
    export         samples as files

needles/       eval_needle.py's plumbing
    tasks          what is hidden, and in which words
    haystack       the text, keys and values
    settings       its flags, and which models are judged
    results        needle.jsonl
    intervals      how sure a mean is
    summary        shares, nats, gains
    report         tables and needle_results.json
    figures        heat-maps and curves
    cost           minutes and memory, said beforehand

explain/       `python recipe.py`
    command        what it says
    figure         what it draws
    distances      what it counts
"""
