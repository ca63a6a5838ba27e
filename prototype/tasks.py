"""Populations: tasks whose loss is written for B copies of the parameters at once."""
import math, os, sys, torch, torch.nn.functional as F
from torch import Tensor
from functools import lru_cache

class Dice:
    def __init__(s,g): s.g=g
    def u(s,a=0.,b=1.): return a+(b-a)*torch.rand((),generator=s.g).item()
    def logu(s,a,b): return math.exp(s.u(math.log(a),math.log(b)))
    def i(s,a,b): return int(torch.randint(a,b+1,(),generator=s.g))
    def pick(s,xs,w=None):
        if w is None: return xs[s.i(0,len(xs)-1)]
        return xs[int(torch.multinomial(torch.tensor(w,dtype=torch.float),1,generator=s.g))]
    def p(s,q): return s.u()<q

@lru_cache
def mnist(side):
    from learned_optim.meta.data import DataOptions, halves, load_images
    meta,_=halves(load_images('mnist',True,DataOptions(download=False)))
    x=meta.pixels.float()/255
    if side<28: x=F.avg_pool2d(x,28//side)
    return x,meta.labels

def lin(x,W,b=None):
    """(N,i)|(B,N,i) by (B,o,i) -> (B,N,o)"""
    if x.dim()==2: x=x.expand(W.shape[0],*x.shape)
    Wt=W.transpose(1,2)
    return torch.bmm(x,Wt) if b is None else torch.baddbmm(b.unsqueeze(1),x,Wt)

ACT={'relu':F.relu,'tanh':torch.tanh,'sigmoid':torch.sigmoid,'gelu':F.gelu,'silu':F.silu,'elu':F.elu,'leaky':lambda x:F.leaky_relu(x,.1)}
def ln(x,w,b,d=1):
    y=F.layer_norm(x,(x.shape[-1],)); sh=(w.shape[0],)+(1,)*(x.dim()-2)+(w.shape[-1],)
    return y*w.view(sh)+b.view(sh)
def bn(x,w,b):
    """x (B,N,c): batch statistics"""
    m=x.mean(1,keepdim=True); v=x.var(1,unbiased=False,keepdim=True)
    return (x-m)*torch.rsqrt(v+1e-5)*w.unsqueeze(1)+b.unsqueeze(1)
def ce(o,y,smooth=0.):
    """o (B,...,c), y (...) shared -> (B,)"""
    B=o.shape[0]; l=F.cross_entropy(o.reshape(-1,o.shape[-1]),y.reshape(1,-1).expand(B,-1).reshape(-1),reduction='none',label_smoothing=smooth)
    return l.view(B,-1).mean(1)

def init_w(shape,kind,g,fan=None):
    fan=fan or max(1,math.prod(shape[1:]))
    r=torch.randn(shape,generator=g)
    if kind=='torch': return (torch.rand(shape,generator=g)*2-1)/math.sqrt(fan)
    if kind=='he': return r*math.sqrt(2/fan)
    if kind=='xavier': return r*math.sqrt(2/(fan+shape[0]))
    if kind=='tiny': return r*1e-3
    if kind=='small': return r*.02
    if kind=='zero': return torch.zeros(shape)
    raise ValueError(kind)

class Pt:
    """name -> init; loss(P,batch). Optional per-tensor reparametrisation alpha."""
    name='?'; alpha=None; jitter=0.
    def full(s,P):
        return P if s.alpha is None else {k:v*s.alpha[k] for k,v in P.items()}
    def start(s,g):
        P=s.init(g)
        if s.alpha is None: return P
        return {k:v/s.alpha[k] for k,v in P.items()}
    def losses(s,P,batch):
        return s.loss(s.full(P),batch)

class MLP:
    def __init__(s,d,i,o,widths,act,init,norm='none',res=False,out_init=None,drop=0.):
        s.dims=[i,*widths,o]; s.act=act; s.init_kind=init; s.norm=norm; s.res=res; s.out_init=out_init or init; s.drop=drop
    def init(s,g,pre=''):
        P={}; n=len(s.dims)-1
        for l in range(n):
            kind=s.out_init if l==n-1 else s.init_kind
            P[f'{pre}w{l}']=init_w((s.dims[l+1],s.dims[l]),kind,g)
            P[f'{pre}b{l}']=((torch.rand(s.dims[l+1],generator=g)*2-1)/math.sqrt(s.dims[l])) if kind=='torch' else torch.zeros(s.dims[l+1])
            if s.norm!='none' and l<n-1: P[f'{pre}g{l}']=torch.ones(s.dims[l+1]); P[f'{pre}c{l}']=torch.zeros(s.dims[l+1])
        return P
    def __call__(s,P,x,pre='',mask=None):
        n=len(s.dims)-1; h=x
        for l in range(n):
            y=lin(h,P[f'{pre}w{l}'],P[f'{pre}b{l}'])
            if l==n-1: return y
            if s.norm=='ln': y=ln(y,P[f'{pre}g{l}'],P[f'{pre}c{l}'])
            elif s.norm=='bn': y=bn(y,P[f'{pre}g{l}'],P[f'{pre}c{l}'])
            y=ACT[s.act](y)
            if mask is not None: y=y*mask[l]
            h=h+y if s.res and h.dim()==3 and h.shape==y.shape else y
    def masks(s,N,g):
        if not s.drop: return None
        return [(torch.rand(N,w,generator=g)>s.drop).float()/(1-s.drop) for w in s.dims[1:-1]]

def widths(d,big=.14):
    depth=d.pick([1,2,3,4,6,8],[6,6,3,2,1,.6])
    hi=96 if not d.p(big) else (400 if depth<=3 else 128)
    return [int(d.logu(8,hi))]*depth if d.p(.6) else [int(d.logu(8,hi)) for _ in range(depth)]
def draw_mlp(d,i,o,big=.14):
    w=widths(d,big); act=d.pick(['relu','tanh','sigmoid','gelu','silu','elu','leaky'],[8,3,4,3,2,1,1])
    deep=len(w)>=4
    norm=d.pick(['none','ln','bn'],[6,2,2]) if not deep else d.pick(['none','ln','bn'],[2,2,2])
    init=d.pick(['torch','he','xavier','tiny','small'],[8,2,2,3 if len(w)<=2 else .3,1])
    if deep and act=='sigmoid': act='relu'
    out='zero' if d.p(.08) else None
    return MLP(d,i,o,w,act,init,norm,res=d.p(.5) if deep else d.p(.1),out_init=out,drop=d.pick([0,.1,.3],[8,1,1]))
def bs(d,lo=4,hi=512): return int(d.logu(lo,hi))

class Classify(Pt):
    def __init__(s,d):
        side=d.pick([7,14,28],[5,4,1.5]); s.x,s.y=mnist(side); s.x=s.x.flatten(1)
        if d.p(.15): n=int(d.logu(64,4096)); k=torch.randperm(len(s.x),generator=d.g)[:n]; s.x,s.y=s.x[k],s.y[k]
        if d.p(.3): s.x=(s.x-s.x.mean())/s.x.std()
        s.noise=d.pick([0,.1,.3],[7,1,1]); s.N=bs(d,8,256 if side<28 else 128); s.net=draw_mlp(d,s.x.shape[1],10)
        s.smooth=d.pick([0,.1],[9,1])
        s.name=f'mnist{side} {s.net.dims[1:]} {s.net.act} {s.net.init_kind} {s.net.norm} bs{s.N} noise{s.noise} n{len(s.x)}'
        if s.net.norm=='bn': s.N=max(s.N,16)
        s.skew=d.p(.1)
        if s.skew: s.pw=(1/(1+s.y.float())**2)
    def init(s,g): return s.net.init(g)
    def batch(s,g):
        i=torch.multinomial(s.pw,s.N,True,generator=g) if s.skew else torch.randint(len(s.x),(s.N,),generator=g)
        y=s.y[i]
        if s.noise: r=torch.rand(s.N,generator=g)<s.noise; y=torch.where(r,torch.randint(10,(s.N,),generator=g),y)
        return s.x[i],y,s.net.masks(s.N,g)
    def loss(s,P,b): return ce(s.net(P,b[0],mask=b[2]),b[1],s.smooth)

class Teacher(Pt):
    """Tabular regression or classification by a random teacher network or additive function."""
    def __init__(s,d):
        i=int(d.logu(2,64)); s.cls=d.p(.4); o=d.i(2,8) if s.cls else d.pick([1,1,4]); g=d.g
        n=int(d.logu(200,8000)); cond=d.pick([0,1,2],[3,2,1]); X=torch.randn(n,i,generator=g)
        scale=torch.exp(torch.randn(i,generator=g)*cond*.7)
        if d.p(.2): X=X.sign()*X.abs()**2
        W1=torch.randn(i,32,generator=g)/math.sqrt(i); W2=torch.randn(32,o,generator=g)/math.sqrt(32)
        z=torch.tanh(X@W1*d.u(.5,3))@W2*2+(torch.sin(2*X[:,:1]*d.u(.5,2)) if d.p(.4) else 0)
        z=(z-z.mean(0))/(z.std(0)+1e-6)
        s.X=X*scale; s.heavy=d.p(.15)
        noise=d.pick([0,.1,.5],[3,3,1])
        if s.cls: s.Y=(z+noise*torch.randn(z.shape,generator=g)).argmax(1)
        else:
            e=torch.randn(z.shape,generator=g)
            if s.heavy: e=e/torch.rand(z.shape,generator=g).clamp(min=.02).sqrt()
            s.Y=(z+noise*e)*(1. if d.p(.7) else d.logu(.1,10))+(0 if d.p(.8) else d.u(-3,3))
        s.N=bs(d,4,512); s.net=draw_mlp(d,i,o,.12); 
        if s.net.norm=='bn': s.N=max(s.N,16)
        s.hub=d.p(.15); s.name=f'teacher {"cls" if s.cls else "reg"} {s.net.dims} {s.net.act} {s.net.init_kind} {s.net.norm} bs{s.N} n{n}'
    def init(s,g): return s.net.init(g)
    def batch(s,g):
        i=torch.randint(len(s.X),(s.N,),generator=g); return s.X[i],s.Y[i],s.net.masks(s.N,g)
    def loss(s,P,b):
        o=s.net(P,b[0],mask=b[2])
        if s.cls: return ce(o,b[1])
        e=o-b[1]; 
        return (F.huber_loss(e,torch.zeros_like(e),reduction='none') if s.hub else e.square()).mean((1,2))

class Quad(Pt):
    def __init__(s,d):
        s.n=int(d.logu(4,100)); g=d.g; s.kind=d.pick(['thesis','ill','rosen'],[2,3,1])
        if s.kind=='thesis': s.n=10; s.W=torch.randn(10,10,generator=g); s.y=torch.randn(10,generator=g)
        elif s.kind=='ill':
            q,_=torch.linalg.qr(torch.randn(s.n,s.n,generator=g)); e=torch.exp(torch.linspace(0,-d.u(1,5),s.n)); s.W=(q if d.p(.6) else torch.eye(s.n))*e; s.y=torch.zeros(s.n)
        s.x0=torch.randn(s.n,generator=g)*d.logu(.1,3) if s.kind!='thesis' else torch.zeros(s.n)
        s.noise=d.pick([0,.1,.5],[2,1,1]); s.name=f'quad {s.kind} {s.n} noise{s.noise}'
    def init(s,g): return {'x':s.x0.clone()}
    def batch(s,g): return (s.noise*torch.randn(s.n,generator=g),)
    def loss(s,P,b):
        x=P['x']
        if s.kind=='rosen':
            v=x+.05*b[0]; return ((v[:,1:]-v[:,:-1]**2)**2*5+(1-v[:,:-1])**2).mean(1)
        return ((x+b[0])@s.W.T-s.y).square().sum(1)

class Coord(Pt):
    """Coordinate networks: sine (Sitzmann et al. 2020) or Fourier features and ReLU."""
    def __init__(s,d):
        g=d.g; s.dim=d.pick([1,2],[2,1]); s.sine=d.p(.6); s.w0=d.logu(5,40) if s.sine else 0
        s.W=int(d.logu(16,96)); s.depth=d.pick([1,2,3],[1,3,1]); k=d.i(2,5); fmax=d.logu(6,60 if s.dim==1 else 20)
        s.freq=torch.randn(k,s.dim,generator=g)*fmax/2; s.amp=torch.rand(k,generator=g)+.2; s.ph=torch.rand(k,generator=g)*6.3
        s.N=bs(d,64,512); s.fm=torch.randn(s.dim,12,generator=g)*fmax/3 if not s.sine else None
        s.name=f'coord {"sine%.0f"%s.w0 if s.sine else "fourier"} d{s.dim} {s.W}x{s.depth} f{fmax:.0f}'
        if not s.sine: s.net=MLP(d,24,1,[s.W]*s.depth,'relu','torch')
    def init(s,g):
        if not s.sine: return s.net.init(g)
        dims=[s.dim]+[s.W]*s.depth+[1]; P={}
        for l in range(len(dims)-1):
            b=1/dims[l] if l==0 else math.sqrt(6/dims[l])/s.w0
            P[f'w{l}']=(torch.rand(dims[l+1],dims[l],generator=g)*2-1)*b; P[f'b{l}']=(torch.rand(dims[l+1],generator=g)*2-1)/math.sqrt(dims[l])
        return P
    def batch(s,g):
        x=torch.rand(s.N,s.dim,generator=g)*2-1; y=(torch.sin(x@s.freq.T+s.ph)*s.amp).sum(1,keepdim=True); return x,y
    def loss(s,P,b):
        x,y=b
        if not s.sine: o=s.net(P,torch.cat((torch.sin(x@s.fm),torch.cos(x@s.fm)),1))
        else:
            h=x; n=s.depth+1
            for l in range(n):
                h=lin(h,P[f'w{l}'],P[f'b{l}'])
                if l<n-1: h=torch.sin(s.w0*h)
            o=h
        return (o-y).square().mean((1,2))

class Pinn(Pt):
    """1-D boundary value problem u'' + k u = f on [0,1] by a tanh network; derivatives by hand."""
    def __init__(s,d):
        s.W=int(d.logu(12,48)); s.depth=d.pick([1,2],[1,2]); s.N=bs(d,32,256); s.k=d.u(-3,3); s.fr=d.u(1,6); s.bw=d.logu(1,30); s.sc=d.u(1,4)
        s.name=f'pinn {s.W}x{s.depth}'; s.net=MLP(d,1,1,[s.W]*s.depth,'tanh',d.pick(['torch','xavier']))
    def init(s,g): return s.net.init(g)
    def batch(s,g): return (torch.rand(s.N,1,generator=g),)
    def jet(s,P,x):
        B=P['w0'].shape[0]; v=lin(x*s.sc,P['w0'],P['b0']); d1=(s.sc*P['w0'].transpose(1,2)).expand(B,x.shape[0],-1); d2=torch.zeros_like(d1); n=s.depth
        for l in range(n):
            t=torch.tanh(v); a=1-t*t; d2=a*d2-2*t*a*d1*d1; d1=a*d1; v=t
            W=P[f'w{l+1}']; v=lin(v,W,P[f'b{l+1}']); d1=lin(d1,W); d2=lin(d2,W)
        return v,d1,d2
    def loss(s,P,b):
        x=b[0]; u,_,u2=s.jet(P,x); f=torch.sin(s.fr*math.pi*x); e=torch.tensor([[0.],[1.]]); ub,_,_=s.jet(P,e)
        return ((u2/10+s.k*u-f)**2).mean((1,2))+s.bw*(ub-torch.tensor([[0.],[.5]])).square().mean((1,2))

class MF(Pt):
    def __init__(s,d):
        g=d.g; s.n=int(d.logu(40,600)); s.m=int(d.logu(40,600)); r=d.i(2,6); s.k=d.pick([4,8,16,32]); s.N=bs(d,16,256); s.std=d.pick([.01,.1,1.],[1,3,1]); s.bias=d.p(.6)
        s.A=torch.randn(s.n,r,generator=g); s.Bm=torch.randn(s.m,r,generator=g)/math.sqrt(r); s.nz=d.u(.05,.5); s.off=d.u(-1,3) if d.p(.3) else 0.; s.zipf=d.p(.4); s.imp=d.p(.2)
        s.pw=[1/(torch.arange(k).float()+3) for k in (s.n,s.m)]; s.name=f'mf {s.n}x{s.m} k{s.k} std{s.std} bs{s.N} bias{s.bias}'
    def init(s,g):
        P={'u':torch.randn(s.n,s.k,generator=g)*s.std,'v':torch.randn(s.m,s.k,generator=g)*s.std}
        if s.bias: P|={'bu':torch.zeros(s.n,1),'bv':torch.zeros(s.m,1),'c':torch.zeros(())}
        return P
    def batch(s,g):
        i,j=[torch.multinomial(w,s.N,True,generator=g) if s.zipf else torch.randint(len(w),(s.N,),generator=g) for w in s.pw]
        y=(s.A[i]*s.Bm[j]).sum(1)+s.off
        if s.imp: return i,j,(torch.rand(s.N,generator=g)<torch.sigmoid(2*y)).float()
        return i,j,y+s.nz*torch.randn(s.N,generator=g)
    def loss(s,P,b):
        i,j,y=b; o=(P['u'][:,i]*P['v'][:,j]).sum(-1)
        if s.bias: o=o+P['bu'][:,i,0]+P['bv'][:,j,0]+P['c'][:,None]
        if s.imp: return F.binary_cross_entropy_with_logits(o,y.expand_as(o),reduction='none').mean(1)
        return (o-y).square().mean(1)

class Skip(Pt):
    """Skip-gram with negative samples on a random Markov chain with Zipf words."""
    def __init__(s,d):
        g=d.g; s.V=int(d.logu(60,800)); s.k=d.pick([8,16,32]); s.N=bs(d,32,256); s.neg=5; c=8; s.std=d.pick([.02,.1,1.],[1,1,1]); s.zero=d.p(.4)
        s.cl=torch.randint(c,(s.V,),generator=g); s.pw=1/(torch.arange(s.V).float()+2); s.name=f'skip {s.V} k{s.k} std{s.std}'
        s.same=(s.cl[:,None]==s.cl[None]).float()*20+.2; s.tab=s.same*s.pw
    def init(s,g): return {'e':torch.randn(s.V,s.k,generator=g)*s.std,'o':torch.zeros(s.V,s.k) if s.zero else torch.randn(s.V,s.k,generator=g)*s.std}
    def batch(s,g):
        i=torch.multinomial(s.pw,s.N,True,generator=g); p=torch.multinomial(s.tab[i],1,generator=g)[:,0]; n=torch.multinomial(s.pw,s.N*s.neg,True,generator=g).view(s.N,s.neg); return i,torch.cat((p[:,None],n),1)
    def loss(s,P,b):
        i,c=b; e=P['e'][:,i]; o=(P['o'][:,c]*e.unsqueeze(2)).sum(-1); return F.softplus(-o[...,0]).mean(1)+F.softplus(o[...,1:]).sum(-1).mean(1)

def attention(q,k,v,heads,causal):
    sh=q.shape; f=lambda t:t.unflatten(-1,(heads,-1)).transpose(-2,-3)
    q,k,v=f(q),f(k),f(v); a=q@k.transpose(-1,-2)/math.sqrt(q.shape[-1])
    if causal: a=a.masked_fill(torch.ones(a.shape[-2:],dtype=torch.bool).triu(1),-1e9)
    return (torch.softmax(a,-1)@v).transpose(-2,-3).flatten(-2)
class Seq(Pt):
    """Language models on a random second-order grammar, or row-token classification of images."""
    def __init__(s,d,kind=None):
        g=d.g; s.kind=kind or d.pick(['attn','gru','rnn','rows'],[5,1.2,.8,2]); s.w=d.pick([16,24,32,48],[3,2,2,.7]); s.depth=d.pick([1,2],[2,1]); s.heads=d.pick([2,4]); s.L=d.i(8,16); s.N=int(d.logu(4,16))
        s.V=d.i(12,48); s.post=d.p(.4); s.tied=d.p(.6); s.std=d.pick([.02,.1,1.],[4,1,1 if not s.tied else .0]); s.mult=d.pick([2,4]); s.iw=d.pick(['torch','small','xavier'],[3,2,2])
        if s.kind=='rows': s.side=d.pick([7,14]); s.x,s.y=mnist(s.side); s.x=s.x[:,0]; s.L=s.side+1; s.post=d.p(.5)
        else:
            conc=d.u(.5,2.5); first=d.p(.5); s.tab=torch.softmax(conc*torch.randn(s.V,1 if first else s.V,s.V,generator=g).expand(s.V,s.V,s.V).transpose(0,1)+torch.randn(s.V,generator=g),-1)
            z=torch.zeros(1,dtype=torch.long); toks=[]
            n=4000; a=torch.randint(s.V,(64,),generator=g); b=torch.randint(s.V,(64,),generator=g)
            for _ in range(80):
                c=torch.multinomial(s.tab[a,b],1,generator=g)[:,0]; toks.append(c); a,b=b,c
            s.text=torch.stack(toks,1)  # (64, 80)
            s.text=s.text.flatten()
        s.name=f'seq {s.kind} w{s.w} x{s.depth} V{s.V} L{s.L} bs{s.N} post{s.post} tied{s.tied} std{s.std} {s.iw}'
    def init(s,g):
        w=s.w; P={}
        if s.kind=='rows':
            P['ew']=init_w((w,s.side),'torch',g); P['eb']=torch.zeros(w); P['cls']=torch.zeros(1,w); P['pos']=.02*torch.randn(s.L,w,generator=g)
        else:
            P['e']=torch.randn(s.V,w,generator=g)*s.std
            if s.kind=='attn': P['pos']=torch.zeros(s.L,w) if s.std==.1 else torch.randn(s.L,w,generator=g)*.02
        if s.kind in('attn','rows'):
            for l in range(s.depth):
                P[f'{l}qkv']=init_w((3*w,w),s.iw,g); P[f'{l}qkvb']=torch.zeros(3*w); P[f'{l}o']=init_w((w,w),s.iw,g); P[f'{l}ob']=torch.zeros(w)
                P[f'{l}f1']=init_w((s.mult*w,w),s.iw,g); P[f'{l}f1b']=torch.zeros(s.mult*w); P[f'{l}f2']=init_w((w,s.mult*w),s.iw,g); P[f'{l}f2b']=torch.zeros(w)
                for q in 'ab': P[f'{l}n{q}']=torch.ones(w); P[f'{l}m{q}']=torch.zeros(w)
            if not s.post: P['nf']=torch.ones(w); P['mf']=torch.zeros(w)
        else:
            k=3 if s.kind=='gru' else 1
            P['ih']=init_w((k*w,w),'torch',g); P['hh']=init_w((k*w,w),'torch',g); P['bi']=torch.zeros(k*w); P['bh']=torch.zeros(k*w)
        if s.kind=='rows' or not s.tied: P['h']=init_w((10 if s.kind=='rows' else s.V,w),'torch',g)
        if s.kind=='rows' or not s.tied: P['hb']=torch.zeros(10 if s.kind=='rows' else s.V)
        return P
    def batch(s,g):
        if s.kind=='rows': i=torch.randint(len(s.x),(2*s.N,),generator=g); return s.x[i],s.y[i]
        i=torch.randint(len(s.text)-s.L-1,(s.N,),generator=g); t=s.text[i[:,None]+torch.arange(s.L+1)]; return t[:,:-1],t[:,1:]
    def loss(s,P,b):
        x,y=b; B=next(iter(P.values())).shape[0]; w=s.w
        def L(h,W,bb): return lin(h.flatten(1,-2),W,bb).unflatten(1,h.shape[1:-1])
        if s.kind=='rows':
            h=lin(x.flatten(0,1),P['ew'],P['eb']).unflatten(1,x.shape[:2]); h=torch.cat((P['cls'][:,None].expand(B,x.shape[0],1,w),h),2)+P['pos'][:,None]
        else:
            h=P['e'][:,x]
            if s.kind=='attn': h=h+P['pos'][:,None]
        if s.kind in('attn','rows'):
            for l in range(s.depth):
                def att(z): 
                    q,k,v=L(z,P[f'{l}qkv'],P[f'{l}qkvb']).chunk(3,-1); return L(attention(q,k,v,s.heads,s.kind=='attn'),P[f'{l}o'],P[f'{l}ob'])
                def ff(z): return L(F.gelu(L(z,P[f'{l}f1'],P[f'{l}f1b'])),P[f'{l}f2'],P[f'{l}f2b'])
                na=lambda z:ln(z,P[f'{l}na'],P[f'{l}ma']); nb=lambda z:ln(z,P[f'{l}nb'],P[f'{l}mb'])
                if s.post: h=na(h+att(h)); h=nb(h+ff(h))
                else: h=h+att(na(h)); h=h+ff(nb(h))
            if not s.post: h=ln(h,P['nf'],P['mf'])
        else:
            N=x.shape[0]; st=torch.zeros(B,N,w); out=[]; xi=L(h,P['ih'],P['bi'])
            for t in range(s.L):
                gi=xi[:,:,t]; gh=lin(st,P['hh'],P['bh'])
                if s.kind=='rnn': st=torch.tanh(gi+gh)
                else:
                    r,z,n=gi.chunk(3,-1); r2,z2,n2=gh.chunk(3,-1); r=torch.sigmoid(r+r2); z=torch.sigmoid(z+z2); n=torch.tanh(n+r*n2); st=(1-z)*n+z*st
                out.append(st)
            h=torch.stack(out,2)
        if s.kind=='rows': return ce(lin(h[:,:,0],P['h'],P['hb']),y)
        W=P['e'] if s.tied else P['h']; o=lin(h.flatten(1,2),W,None if s.tied else P['hb']); return ce(o,y.flatten())

class Conv(Pt):
    def __init__(s,d):
        s.side=d.pick([7,14],[1,2]); s.x,s.y=mnist(s.side); s.N=int(d.logu(8,48)); s.c=d.pick([4,8,16,24]); s.depth=d.pick([1,2,3]); s.norm=d.p(.5); s.res=d.p(.4); s.noise=d.pick([0,.2],[3,1]); s.init_k=d.pick(['torch','he']); s.act=d.pick(['relu','silu','gelu'],[3,1,1]); s.pool=d.p(.5)
        s.name=f'conv {s.side} c{s.c}x{s.depth} bn{s.norm} res{s.res} bs{s.N}'
    def init(s,g):
        P={}; i=1
        for l in range(s.depth):
            P[f'w{l}']=init_w((s.c,i,3,3),s.init_k,g); i=s.c
            if s.norm: P[f'g{l}']=torch.ones(s.c); P[f'c{l}']=torch.zeros(s.c)
            else: P[f'b{l}']=torch.zeros(s.c)
        f=s.c if s.pool else s.c*((s.side+1)//2)**2
        P['h']=init_w((10,f),'torch',g); P['hb']=torch.zeros(10); return P
    def batch(s,g):
        i=torch.randint(len(s.x),(s.N,),generator=g); y=s.y[i]
        if s.noise: r=torch.rand(s.N,generator=g)<s.noise; y=torch.where(r,torch.randint(10,(s.N,),generator=g),y)
        return s.x[i],y
    def loss(s,P,b):
        x,y=b; B=P['h'].shape[0]; h=x.expand(s.N,B,s.side,s.side)
        for l in range(s.depth):
            W=P[f'w{l}'].flatten(0,1); z=F.conv2d(h,W,None if s.norm else P[f'b{l}'].flatten(),padding=1,stride=2 if l==0 else 1,groups=B)
            if s.norm:
                m=z.mean((0,2,3),keepdim=True); v=z.var((0,2,3),unbiased=False,keepdim=True); z=(z-m)*torch.rsqrt(v+1e-5)*P[f'g{l}'].reshape(1,-1,1,1)+P[f'c{l}'].reshape(1,-1,1,1)
            z=ACT[s.act](z); h=h+z if s.res and l>0 else z
        h=h.unflatten(1,(B,s.c)).transpose(0,1)  # (B,N,c,s,s)
        h=h.mean((3,4)) if s.pool else h.flatten(2)
        return ce(lin(h,P['h'],P['hb']),y)

class Auto(Pt):
    """Autoencoder, variational autoencoder, denoiser."""
    def __init__(s,d):
        s.side=d.pick([7,14],[2,1]); s.x=mnist(s.side)[0].flatten(1); n=s.x.shape[1]; s.N=bs(d,16,128); s.kind=d.pick(['ae','vae','denoise']); s.h=int(d.logu(16,96)); s.z=d.i(2,12); a=d.pick(['relu','silu','gelu','tanh']); s.sum=d.p(.5)
        ini=d.pick(['torch','he','xavier'])
        if s.kind=='denoise': s.net=MLP(d,n+1,n,[s.h]*d.i(1,3),a,ini,out_init='zero' if d.p(.4) else None); s.x=s.x*2-1
        else: s.enc=MLP(d,n,2*s.z if s.kind=='vae' else s.z,[s.h],a,ini); s.dec=MLP(d,s.z,n,[s.h],a,ini)
        s.name=f'auto {s.kind} {s.side} h{s.h} bs{s.N}'
    def init(s,g): return s.net.init(g) if s.kind=='denoise' else s.enc.init(g,'e')|s.dec.init(g,'d')
    def batch(s,g):
        x=s.x[torch.randint(len(s.x),(s.N,),generator=g)]
        if s.kind=='denoise':
            t=torch.rand(s.N,1,generator=g); e=torch.randn(x.shape,generator=g); return torch.cat(((1-t).sqrt()*x+t.sqrt()*e,t),1),e
        return x,torch.randn(s.N,s.z,generator=g)
    def loss(s,P,b):
        x,e=b
        if s.kind=='denoise': return (s.net(P,x)-e).square().mean((1,2))
        z=s.enc(P,x,'e'); kl=0
        if s.kind=='vae':
            m,lv=z.chunk(2,-1); lv=lv.clamp(-8,8); z=m+e*torch.exp(lv/2); kl=.5*(m.square()+lv.exp()-lv-1).sum(-1).mean(1)
        o=s.dec(P,z,'d')
        if s.kind=='ae': return (o-x).square().mean((1,2))
        r=F.binary_cross_entropy_with_logits(o,x.expand_as(o),reduction='none').sum(-1).mean(1)+kl
        return r if s.sum else r/x.shape[1]

class Restart(Pt):
    """Goes on from weights that Adam has trained: the same task, a shifted one, adapters, a new head."""
    def __init__(s,d):
        s.base=d.pick([Classify,Teacher,Conv,Seq],[4,2,1,2])(d); s.mode=d.pick(['same','shift','adapter','labels'],[2,3,3,1]) if isinstance(s.base,Classify) else 'same'
        g=torch.Generator().manual_seed(d.i(0,2**30)); P=s.base.init(g); P={k:v[None].clone().requires_grad_() for k,v in P.items()}
        o=torch.optim.Adam(P.values(),3e-3 if not isinstance(s.base,Seq) else 2e-3)
        for _ in range(d.i(100,300)):
            l=s.base.loss(P,s.base.batch(g)).sum(); o.zero_grad(); l.backward(); o.step()
        s.P={k:v.detach()[0] for k,v in P.items()}; s.name=f'restart {s.mode} {s.base.name}'
        if not all(bool(v.isfinite().all()) for v in s.P.values()): raise ValueError('pretraining diverged')
        if s.mode!='same':
            n=int(d.logu(64,2000)); i=torch.randperm(len(s.base.x),generator=d.g)[:n]
            s.base.x,s.base.y=s.base.x[i],s.base.y[i]; s.base.skew=False
            if s.mode=='labels': s.base.y=(s.base.y+d.i(1,9))%10
            else: s.base.x=d.u(.5,1.2)*s.base.x+d.u(-.3,.3)+.1*torch.randn(s.base.x.shape,generator=d.g)
        s.rank=d.pick([2,4,8]); s.sc=d.pick([1.,2.,4.])
    def init(s,g):
        if s.mode!='adapter': return {k:v.clone() for k,v in s.P.items()}
        P={}
        for k,v in s.P.items():
            if k[0]=='w': P['a'+k]=init_w((s.rank,v.shape[1]),'torch',g); P['z'+k]=torch.zeros(v.shape[0],s.rank)
        return P
    def batch(s,g): return s.base.batch(g)
    def loss(s,P,b):
        if s.mode=='adapter':
            B=next(iter(P.values())).shape[0]
            P={k:(v+s.sc*torch.bmm(P['z'+k],P['a'+k]) if 'a'+k in P else v.expand(B,*v.shape)) for k,v in s.P.items()}
        return s.base.loss(P,b)

FAMS=[(Classify,22),(Teacher,14),(Quad,4),(Coord,9),(Pinn,3),(MF,7),(Skip,3),(Seq,18),(Conv,6),(Auto,10),(Restart,10)]
def sample(seed):
    for k in range(50):
        g=torch.Generator().manual_seed(seed*1000+k); d=Dice(g); fam=d.pick([f for f,_ in FAMS],[w for _,w in FAMS])
        try: t=fam(d)
        except ValueError: continue
        if d.p(.2):
            P=t.init(torch.Generator().manual_seed(0)); t.alpha={k:math.exp(d.u(-1.5,1.5)) for k in P}
        t.jitter=d.pick([0,.5],[9,1]); return t,d
