from test_scripts import together, read_safetensors, log_of
def test_x(suite, chain, tmp_path):
    flags=["--steps",4,"--max_steps",3,"--dtype","float32"]
    jobs=[suite.start("data.pretrain",*flags,"--out",tmp_path/"one"),*together(suite,2,"data.pretrain",*flags,"--out",tmp_path/"two")]
    for r in map(suite.finish,jobs): assert r.rc==0,r
    one, two = (read_safetensors(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    print(one.keys()==two.keys())
    for k in one: print(k, (one[k]-two[k]).abs().max().item(), ((one[k]-two[k]).abs()>1e-5).sum().item())
    print(log_of(tmp_path/"one"),log_of(tmp_path/"two"))
    def refused(n,*a):
        return [suite.finish(j) for j in together(suite,2,*a)]
    print(refused(2,"data.pretrain",*flags,"--out",tmp_path/"two"))
    print(refused(2,"data.pretrain",*flags,"--out",tmp_path/"two","--seed",9))
