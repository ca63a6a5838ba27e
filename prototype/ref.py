from es import *
import sys
# reference on validation tasks: adamw grid; backbone at several bases
n=int(sys.argv[1]); res=[]
W0=initial_weights()
bases=[.01,.03,.1]
t0=time.time()
for seed,t,T,known in val_tasks(n):
    a=roll_adamw(t,T,seed,LRS,known); fa,_=scores(a,known); af=np.nanmin(fa); 
    rows=[]
    for b in bases:
        o=roll(t,T,seed,W0[None],known,base=b); f,_=scores(o,known); rows.append(f[0]-af)
    res.append(dict(seed=seed,T=T,known=known,name=t.name,adamw=fa.tolist(),bb=rows))
    print(f'{time.time()-t0:6.0f} T{T:5d} {"K" if known else "-"} best lr {LRS[int(np.nanargmin(fa))]:.0e} f {af:6.2f} adam1e-3 {fa[2]-af:+.2f} bb '+' '.join(f'{x:+.3f}' for x in rows)+'  '+t.name,flush=True)
    json.dump(res,open('ref.json','w'))
R=np.array([r['bb'] for r in res]); print('mean',R.mean(0),'median',np.median(R,0),'max',R.max(0)); 
K=np.array([r['known'] for r in res]); print('known',R[K].mean(0),np.median(R[K],0),'unknown',R[~K].mean(0))
