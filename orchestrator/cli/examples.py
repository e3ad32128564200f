"""What stands under "Examples" in the help of each command: a line of why, a line to type."""

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "plan": (
        ("what would run, and its price on usual machines", "iterabre plan campaign.yaml"),
        (
            "on the machines that you have",
            "iterabre plan campaign.yaml --machine 8xH100-80G --machine 2xA100-80G",
        ),
        (
            "times scaled by what an earlier run took on such devices",
            "iterabre plan new.yaml --calibrate runs/old --machine 8xA100-80G",
        ),
    ),
    "compress": (
        ("compress; give it again after any stop", "iterabre compress campaign.yaml --resume"),
        (
            "with a smaller budget than the file says",
            "iterabre compress campaign.yaml --set methods.0.recovery.max_tokens=100000",
        ),
    ),
    "campaign": (
        ("run, or go on with what is there", "iterabre campaign configs/demo.yaml --resume"),
        ("without Ray, in this process", "iterabre campaign c.yaml --set execution.backend=local"),
        ("on the cluster that runs here", "iterabre campaign campaign.yaml --resume --address auto"),
        ("another seed, the file left as it is", "iterabre campaign campaign.yaml --set seeds.0=1"),
        ("other targets", "iterabre campaign campaign.yaml --set 'targets=[{layers: 24}]'"),
    ),
    "status": (
        ("what runs and waits, and numbers so far", "iterabre status runs/smollm2-demo"),
        ("while it runs, from any machine", "iterabre status s3://bucket/runs/llama --watch"),
        ("for a program", "iterabre status s3://bucket/runs/llama --json"),
    ),
    "logs": (
        ("which there are", "iterabre logs runs/smollm2-demo"),
        ("what a recovery said", "iterabre logs runs/q --trajectory q--kd--seed0 --stage recover"),
        ("all that is said from now on", "iterabre logs s3://bucket/runs/llama --follow"),
        ("of the driver itself", "iterabre logs runs/q --stage driver --lines 50"),
    ),
    "cancel": (("the others go on", "iterabre cancel runs/q --trajectory q--kd--seed0"),),
    "pause": (("for as long as others need the cluster", "iterabre pause s3://bucket/runs/llama"),),
    "continue": (
        ("after a pause", "iterabre continue runs/q"),
        ("take up what was cancelled, then --resume", "iterabre continue runs/q --trajectory q--kd--seed0"),
    ),
    "prioritise": (
        ("a method before all others", "iterabre prioritise runs/q 10 --method kd"),
        ("a model after all others", "iterabre prioritise runs/q --model q -- -5"),
    ),
    "report": (
        ("at any time, also while it runs", "iterabre report runs/smollm2-demo"),
        ("two runs side by side", "iterabre report runs/first runs/second --output comparison"),
    ),
    "score": (
        ("which layers matter least", "iterabre score --model Qwen/Qwen2.5-0.5B"),
        (
            "by another criterion, on your own text",
            "iterabre score --model M --criterion block_influence --calibration my.txt",
        ),
    ),
    "prune": (
        ("without layers 20, 21 and 22", "iterabre prune --model DIR --drop 20-22 --output pruned"),
        (
            "a model that brings its own code, which you have read",
            "iterabre prune --model O/M --drop 3 --output out --trust-remote-code",
        ),
    ),
    "evaluate": (
        ("lm-eval tasks", "iterabre evaluate --model pruned --tasks arc_easy,piqa"),
        ("quickly, for a program", "iterabre evaluate --model DIR --tasks blimp --limit 50 --json"),
        ("a hub model as it was", "iterabre evaluate --model O/M --revision 1a2b3c --tasks piqa"),
        (
            "how it writes and counts, and how fast",
            "iterabre evaluate --model M --probes degeneration,arithmetic --throughput",
        ),
        (
            "a model that chats, with its template",
            "iterabre evaluate --model M --tasks boolq --apply-chat-template",
        ),
        ("what it answered, a file a task", "iterabre evaluate --model M --tasks gsm8k --log-samples out"),
        ("a pruned model as the draft of its source", "iterabre evaluate --model M --assistant DIR"),
    ),
    "export": (
        (
            "the recovered model of the second iteration",
            "iterabre export runs/q --trajectory q--kd--seed0 --iteration 2 --output o",
        ),
        (
            "as a GGUF file, too",
            "iterabre export r/q --trajectory t --iteration 2 --output o --format gguf",
        ),
    ),
    "sweep": (
        ("every layer once", "iterabre sweep --model DIR --output sweep"),
        (
            "some layers, on four GPUs of a cluster",
            "iterabre sweep --model DIR --layers 0-9 --actors 4 --gpus 1 --address auto",
        ),
    ),
    "cache": (
        ("what campaigns share, and how large it is", "iterabre cache list /nfs/cache"),
        ("read all of it", "iterabre cache verify s3://bucket/cache"),
        (
            "what nobody used for a month goes, and more above 2 TB",
            "iterabre cache prune /nfs/cache --unused-days 30 --keep-gb 2000",
        ),
    ),
    "ls": (
        ("what may decide which layers go", "iterabre ls criteria"),
        ("whether lm-eval has a task", "iterabre ls tasks --search winogrande"),
    ),
    "init": (
        ("asks", "iterabre init"),
        (
            "does not ask",
            "iterabre init a.yaml --model Qwen/Qwen2.5-7B --fractions 0.1,0.25 --gpus 8",
        ),
        (
            "small, for CPUs, with a text that is built in",
            "iterabre init b.yaml --model DIR --gpus 0 --data wikitext-2-raw-validation",
        ),
    ),
    "doctor": (
        ("this machine", "iterabre doctor"),
        ("a cluster and its storage", "iterabre doctor --address auto --storage s3://bucket/runs"),
    ),
    "schema": (
        (
            "then begin a file with: # yaml-language-server: $schema=campaign.schema.json",
            "iterabre schema > campaign.schema.json",
        ),
    ),
}


def epilog(command: str) -> str:
    """Return the examples of `command` for typer, which needs an empty line between lines."""
    lines = ["Examples"]
    for why, line in EXAMPLES[command]:
        lines += [f"# {why}", line]
    return "\n\n".join(lines)
