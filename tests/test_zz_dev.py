from test_scripts import together, read_safetensors, log_of
def test_x(suite, chain, tmp_path):
    for seed in range(4):
        flags=["--init",chain/"sft","--online","--batch_size",16,"--max_steps",3,"--dtype","float32","--max_new",24, "--seed",seed]
        suite.ok("dpo.py",*flags,"--out",tmp_path/f"one{seed}")
        print(seed,[r["pairs"] for r in log_of(tmp_path/f"one{seed}")])
