from es import *
import multiprocessing as mp, argparse, pickle
ap=argparse.ArgumentParser(); ap.add_argument('--out',default='run1'); ap.add_argument('--steps',type=int,default=700); ap.add_argument('--tasks',type=int,default=8); ap.add_argument('--pairs',type=int,default=4); ap.add_argument('--sigma',type=float,default=.03); ap.add_argument('--lr',type=float,default=6e-3); ap.add_argument('--lrf',type=float,default=5e-4); ap.add_argument('--workers',type=int,default=2); ap.add_argument('--seed',type=int,default=0); ap.add_argument('--init'); ap.add_argument('--val',type=int,default=64); ap.add_argument('--every',type=int,default=40)
A=ap.parse_args(); os.makedirs(A.out,exist_ok=True)
def eps(seed,pairs): return torch.randn(pairs,NW,generator=torch.Generator().manual_seed(seed))
def work(job):
    seed,theta,sigma,pairs=job
    try:
        t,T,known=draw(seed); e=eps(seed,pairs)*sigma; w=torch.cat((theta+e,theta-e)); t0=time.perf_counter()
        o=roll(t,T,seed,w,known); return seed,fitness(o,known),type(t).__name__,time.perf_counter()-t0
    except Exception as err:
        print('FAIL',seed,repr(err),flush=True); return seed,None,'fail',0
def vwork(job):
    i,weights=job; seed=10_000_000+i; t,T,known=draw(seed,lo=150); o=roll(t,T,seed,weights,known); return i,scores(o,known)[0]
if __name__=='__main__':
    path=f'{A.out}/state.pt'
    if os.path.exists(path): S=torch.load(path,weights_only=False)
    else:
        w=torch.load(A.init) if A.init else initial_weights(A.seed)
        S=dict(theta=w,m=torch.zeros(NW),v=torch.zeros(NW),ema=w.clone(),k=0,best=1e9)
    ref={i:r for i,r in enumerate(json.load(open('ref.json')))} if os.path.exists('ref.json') else {}
    pool=mp.get_context('fork').Pool(A.workers); os.nice(0); t0=time.time(); ema_stats={}
    log=open(f'{A.out}/log.txt','a')
    def say(s): log.write(s+'\n'); log.flush()
    while S['k']<A.steps:
        k=S['k']
        if k%A.every==0:
            ref={i:r for i,r in enumerate(json.load(open('ref.json')))} if os.path.exists('ref.json') else {}
            torch.save(S['ema'],f'{A.out}/ema{k}.pt')
        if k%A.every==0 and k>0 and len(ref)>=A.val:
            r=dict(pool.imap_unordered(vwork,[(i,torch.stack((S['theta'],S['ema']))) for i in range(A.val)]))
            R=np.array([r[i]-np.nanmin(ref[i]['adamw']) for i in range(A.val) if i in ref]); K=np.array([ref[i]['known'] for i in range(A.val) if i in ref])
            m=np.minimum(R,1.5).mean(0)
            say(f'== {time.time()-t0:.0f}s step {k} val(raw,ema) mean {m.round(4)} median {np.median(R,0).round(4)} known {np.minimum(R[K],1.5).mean(0).round(3)} med {np.median(R[K],0).round(3)} unknown {np.minimum(R[~K],1.5).mean(0).round(3)} worst {np.sort(R[:,1])[-4:].round(2)} frac ahead {(R<0).mean(0).round(2)}')
            torch.save(S['ema'],f'{A.out}/ema{k}.pt')
        lr=A.lrf+(A.lr-A.lrf)*.5*(1+math.cos(math.pi*k/A.steps))
        jobs=[(100_000*(A.seed+1)+k*A.tasks+j,S['theta'],A.sigma,A.pairs) for j in range(A.tasks)]
        g=torch.zeros(NW); n=0; info=[]
        for seed,f,name,dt in sorted((x for x in pool.imap_unordered(work,jobs)),key=lambda x:x[0]):
            if f is None: continue
            e=eps(seed,A.pairs); d=torch.tensor(np.clip(f[:A.pairs]-f[A.pairs:],-8,8),dtype=torch.float32)
            if not torch.isfinite(d).all(): say(f'nonfinite {seed} {name}'); continue
            u=torch.asinh(d/.02); g+=(u[:,None]*e).sum(0); n+=A.pairs; info.append((name,float(np.mean(f)),float(d.abs().mean()),dt))
        g/=max(1,n); S['k']=k=k+1
        S['m'].lerp_(g,.1); S['v'].mul_(.99).addcmul_(g,g,value=.01)
        mh=S['m']/(1-.9**k); vh=S['v']/(1-.99**k)
        S['theta']=S['theta']-lr*mh/(vh.sqrt()+1e-8)
        S['ema']=S['ema'].lerp(S['theta'],max(.02,1/(k+1)))
        torch.save(S,path+'.tmp'); os.replace(path+'.tmp',path)
        say(f'{time.time()-t0:.0f}s {k} '+' '.join(f'{a}:{b:.2f}/{c:.3f}/{d:.1f}s' for a,b,c,d in info))
