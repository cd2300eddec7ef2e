"""What several tests share, or what a process that a test starts imports: `from support.waiting import LIMIT`.

For all tests:
    waiting: how tests wait, with the one limit; how a process that a test has started ends.
    tiny_run: the command line of a run that takes seconds.
    tiny_corpus: the corpus of such a run, as a fixture.
    stopped_run: such a run that was asked to stop, and what a refused command says.
    study_samples: a study of such runs.
    ports: for ranks to meet at.
    two_ranks: `megatron-lfr train` on two ranks without a launcher.
    run_process: `megatron-lfr train` in a process of its own, to be stopped and killed.
    same_run: whether two runs are the same, times apart.
    slurm: a cluster that runs the scripts of jobs on this machine.
    close_runs: whether two runs differ by rounding alone.
    folder_bytes: a folder's content, to see that nothing has touched it.
    script: a script of the repository, in a process of its own.
    peers: packages that a test compares with.
    golden: what must never change; stores it anew. golden_orders, golden_losses: how it is computed.

Oracles, which say what must come out, plainly and without regard to speed:
    order_oracles: the orders of phases, from the definitions.
    engine_oracle: steps of the engine, in fp64 on one process. dropout_oracle: what dropout drops in them.
    lora_oracle, rite_oracle: steps of adapters, and LoRA-RITE's update of them.
    cross_entropy_oracle: losses and gradients, token by token; and the cases that every path is run on.
    flex_on_cpu: flex_attention where there is no GPU, in eager mode.
    hf_weights: whole models under Hugging Face's names, and transformers' Llama.
    text_run_oracle: transformers' model with a run's weights.
    measured: what torch measures of an engine's step.

Samples:
    checkpoint_samples: checkpoints of one number each.
    order_samples: every kind of order that the C++ core makes, of scores that are the same everywhere.
    indexed_samples: indexed datasets written by hand.
    commonness_samples: real text as tokens, copies of it with edits, and junk.
    own_callbacks: callbacks as a user writes them.
    continuation_samples: contexts and continuations whose border is no border of tokens.
    families: tiny models of every family, by transformers. gpt2_tokenizer: a vocabulary and merges as GPT-2's.
    hf_runs: run folders and Hugging Face folders of small models.
    launcher_environments: what launchers put into the environment of each rank.
    megatron_argument_lists: those of Megatron-LM's Llama-3 scripts.

Cases, which run in processes that a test starts, and return their results to it:
    engine_cases, tensor_parallel_cases, session_cases: ranks of an engine, of layers, of sessions.
    engine_steps, engine_adapters, engine_supervised, engine_faults, engine_costs: the engine's cases.
    engine_layouts, engine_errors: what they are made of, and how far an engine is from the oracle.
    family_cases: ranks that train a model of each family.
    launcher_cases, doctor_cases: ranks that meet under each launcher, and that a doctor looks at.
    deepspeed_cases, deepspeed_memory: ranks of DeepSpeed's engine, of runs under it, and what memory they take.
    benchmark_cases: benchmarks on two ranks, each of a layout.
    order_file_cases, skipped_step_cases: two ranks that share orders, and that skip a step.
    rank_cases, async_cases: two ranks on one store, and on asynchronous ones.
    crash_cases, kill_cases: saves, conversions and branches that are killed.
    rank_memory_cases, two_rank_checkpoints: two ranks that measure a layout, and that write shards.
    compile_kernels: Triton's kernels compiled for GPUs that need not be there.
    browser: a page in a headless Chromium.
"""
