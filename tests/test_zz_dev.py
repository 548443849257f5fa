import time, compileall
def test_x(suite, chain, tmp_path):
    def t(n=6):
        a=time.time()
        for _ in range(n): suite.run("ppo.py","--help")
        return (time.time()-a)/n
    print(t()); 
    pass
    print("compiled", t())
    for i,s in enumerate(("--max_steps 1","--max_steps 2","--max_steps 2 --max_new 8")):
        a=time.time(); suite.ok("sft.py","--init",chain/"base",*s.split(),"--out",tmp_path/str(i)); print(s,time.time()-a)
    a=time.time(); suite.ok("ppo.py","--init",chain/"sft","--reward","gold","--rollouts",8,"--max_new",8,"--iterations",1,"--out",tmp_path/"p"); print("ppo",time.time()-a)
    import cProfile
    (tmp_path/"prof.py").write_text("import cProfile,runpy,sys\nscript=sys.argv.pop(1)\np=cProfile.Profile()\np.enable()\ntry:\n    runpy.run_path(script,run_name='__main__')\nfinally:\n    p.disable()\n    import pstats\n    pstats.Stats(p).sort_stats('cumtime').print_stats(45)\n")
    r=suite.run(tmp_path/"prof.py",suite.root/"ppo.py","--init",chain/"sft","--reward","gold","--rollouts",8,"--max_new",8,"--iterations",1,"--out",tmp_path/"p2",env={"PYTHONPATH":str(suite.root)})
    print(r.out[-9000:])
