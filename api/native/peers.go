package native

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

// Peers is about other nodes: who they are, and what moves between them and this one.
type Peers interface {
	// NodeToken returns a token with which one node can join this one, once.
	NodeToken(ctx context.Context) (NodeToken, error)
	// JoinNode makes this node and the one at addr trust each other.
	JoinNode(ctx context.Context, addr, token string) (NodeInfo, error)
	// Nodes lists the nodes that this one trusts, and asks each whether it is there.
	Nodes(ctx context.Context) ([]NodeInfo, error)
	// ForgetNode ends the trust in a node.
	ForgetNode(ctx context.Context, ref string) error
	// Carry copies a snapshot or an image to another node, or from it.
	Carry(ctx context.Context, req CarryRequest, report func(carry.Progress)) (carry.Result, error)
	// Stored lists what is in the object store, oldest first.
	Stored(ctx context.Context) ([]carry.Stored, error)
	// Unstore removes something from it.
	Unstore(ctx context.Context, ref string) error
	// Migrate moves a running sandbox to another node.
	Migrate(ctx context.Context, ref, node string, report func(carry.Progress)) (carry.Moved, error)
	// ResolveMove ends a move that is under way or in doubt.
	ResolveMove(ctx context.Context, ref string, o carry.ResolveOptions) (carry.Resolution, error)
}

// Peering is what a node needs for it.
type Peering struct {
	Group   *peer.Group
	Carrier *carry.Carrier
}

// NodeToken is a token and where it is used.
type NodeToken struct {
	Token   string    `json:"token"`
	Addr    string    `json:"addr"` // of this node
	Expires time.Time `json:"expires"`
}

// NodeInfo is another node as it is seen from here.
type NodeInfo struct {
	ID      string        `json:"id"`
	Name    string        `json:"name"`
	Addr    string        `json:"addr"`
	Site    string        `json:"site,omitempty"` // where it says that it is, "region/place"
	Joined  time.Time     `json:"joined"`
	Answers time.Duration `json:"answers,omitempty"` // how long an answer takes; 0: it does not
	Error   string        `json:"error,omitempty"`   // why it does not
	Moving  []string      `json:"moving,omitempty"`  // names of sandboxes that are on their way there, and stand still
}

// JoinRequest names a node and shows its token.
type JoinRequest struct {
	Addr  string `json:"addr"`
	Token string `json:"token"`
}

// CarryRequest says what to copy.
type CarryRequest struct {
	Kind carry.Kind `json:"kind"`
	Ref  string     `json:"ref"`
	Node string     `json:"node"`
	Pull bool       `json:"pull,omitempty"` // from that node, not to it
	Lazy bool       `json:"lazy,omitempty"` // pull of a snapshot: done once it can be restored; the rest comes behind
}

// MigrateRequest says where to.
type MigrateRequest struct {
	Node string `json:"node"`
}

// pingTimeout bounds how long a node is asked whether it is there.
const pingTimeout = 5 * time.Second

// ready fails with Unsupported where there is no daemon.
func (l *Local) ready() (Peering, error) {
	if l.peers.Group == nil {
		return Peering{}, sandbox.Errorf("native.Nodes", sandbox.Unsupported, "", "other nodes are a daemon's business").WithHint("start one with `atoll up -d`")
	}
	return l.peers, nil
}

// NodeToken implements Backend.
func (l *Local) NodeToken(context.Context) (NodeToken, error) {
	p, err := l.ready()
	if err != nil {
		return NodeToken{}, err
	}
	token, err := p.Group.Token()
	return NodeToken{Token: token, Addr: p.Group.Addr(), Expires: time.Now().UTC().Add(peer.TokenLife).Truncate(time.Second)}, err
}

// JoinNode implements Backend.
func (l *Local) JoinNode(ctx context.Context, addr, token string) (NodeInfo, error) {
	p, err := l.ready()
	if err != nil {
		return NodeInfo{}, err
	}
	joined, err := p.Group.Join(ctx, addr, token)
	if err != nil {
		return NodeInfo{}, err
	}
	if joined, err = p.Group.Find(joined.ID); err != nil {
		return NodeInfo{}, err
	}
	return look(ctx, p.Group, joined), nil
}

func look(ctx context.Context, g *peer.Group, p peer.Peer) NodeInfo {
	ctx, stop := context.WithTimeout(ctx, pingTimeout)
	defer stop()
	info := NodeInfo{ID: p.ID, Name: p.Name, Addr: p.Addr, Joined: p.Joined}
	var err error
	if info.Answers, err = g.Ping(ctx, p); err != nil {
		info.Error = ProblemOf(err).Detail
	}
	if p, err = g.Find(p.ID); err == nil {
		info.Site = p.Site // as it has just said
	}
	return info
}

// Nodes implements Backend.
func (l *Local) Nodes(ctx context.Context) ([]NodeInfo, error) {
	p, err := l.ready()
	if err != nil {
		return nil, err
	}
	out := []NodeInfo{}
	leaving := l.node.Leaving()
	for _, known := range p.Group.List() {
		info := look(ctx, p.Group, known)
		for _, sb := range leaving {
			if sb.Moving == known.ID {
				info.Moving = append(info.Moving, sb.Name)
			}
		}
		out = append(out, info)
	}
	return out, nil
}

// ForgetNode implements Backend.
func (l *Local) ForgetNode(_ context.Context, ref string) error {
	p, err := l.ready()
	if err != nil {
		return err
	}
	return p.Group.Forget(ref)
}

// Carry implements Backend.
func (l *Local) Carry(ctx context.Context, req CarryRequest, report func(carry.Progress)) (carry.Result, error) {
	p, err := l.ready()
	if err != nil {
		return carry.Result{}, err
	}
	if req.Lazy {
		if req.Kind != carry.Snapshot || !req.Pull {
			return carry.Result{}, sandbox.Errorf("native.Carry", sandbox.Invalid, req.Ref, "only a snapshot that is pulled can come later")
		}
		return p.Carrier.PullLate(ctx, req.Ref, req.Node, report)
	}
	if req.Pull {
		return p.Carrier.Pull(ctx, req.Kind, req.Ref, req.Node, report)
	}
	return p.Carrier.Push(ctx, req.Kind, req.Ref, req.Node, report)
}

// Stored implements Backend.
func (l *Local) Stored(ctx context.Context) ([]carry.Stored, error) {
	p, err := l.ready()
	if err != nil {
		return nil, err
	}
	return p.Carrier.Stored(ctx)
}

// Unstore implements Backend.
func (l *Local) Unstore(ctx context.Context, ref string) error {
	p, err := l.ready()
	if err != nil {
		return err
	}
	return p.Carrier.Unstore(ctx, ref)
}

// Migrate implements Backend.
func (l *Local) Migrate(ctx context.Context, ref, to string, report func(carry.Progress)) (carry.Moved, error) {
	p, err := l.ready()
	if err != nil {
		return carry.Moved{}, err
	}
	return p.Carrier.Migrate(ctx, ref, to, report)
}

// ResolveMove implements Backend.
func (l *Local) ResolveMove(ctx context.Context, ref string, o carry.ResolveOptions) (carry.Resolution, error) {
	p, err := l.ready()
	if err != nil {
		return carry.Resolution{}, err
	}
	return p.Carrier.Resolve(ctx, ref, o)
}

// NodeToken implements Backend.
func (c *Client) NodeToken(ctx context.Context) (NodeToken, error) {
	return ask[NodeToken](ctx, c, "native.NodeToken", http.MethodPost, "/nodes/token", nil, nil)
}

// JoinNode implements Backend.
func (c *Client) JoinNode(ctx context.Context, addr, token string) (NodeInfo, error) {
	return ask[NodeInfo](ctx, c, "native.JoinNode", http.MethodPost, "/nodes", nil, JoinRequest{Addr: addr, Token: token})
}

// Nodes implements Backend.
func (c *Client) Nodes(ctx context.Context) ([]NodeInfo, error) {
	return ask[[]NodeInfo](ctx, c, "native.Nodes", http.MethodGet, "/nodes", nil, nil)
}

// ForgetNode implements Backend.
func (c *Client) ForgetNode(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.ForgetNode", http.MethodDelete, "/nodes/"+url.PathEscape(ref), nil, nil)
}

// Carry implements Backend.
func (c *Client) Carry(ctx context.Context, req CarryRequest, report func(carry.Progress)) (carry.Result, error) {
	return follow[carry.Progress, carry.Result](ctx, c, "native.Carry", "/carry", nil, req, report)
}

// Stored implements Backend.
func (c *Client) Stored(ctx context.Context) ([]carry.Stored, error) {
	return ask[[]carry.Stored](ctx, c, "native.Stored", http.MethodGet, "/store", nil, nil)
}

// Unstore implements Backend.
func (c *Client) Unstore(ctx context.Context, ref string) error {
	return c.tell(ctx, "native.Unstore", http.MethodDelete, "/store", url.Values{"ref": {ref}}, nil)
}

// Migrate implements Backend.
func (c *Client) Migrate(ctx context.Context, ref, to string, report func(carry.Progress)) (carry.Moved, error) {
	return follow[carry.Progress, carry.Moved](ctx, c, "native.Migrate", sandboxPath(ref, "/migrate"), nil, MigrateRequest{Node: to}, report)
}

// ResolveMove implements Backend.
func (c *Client) ResolveMove(ctx context.Context, ref string, o carry.ResolveOptions) (carry.Resolution, error) {
	return ask[carry.Resolution](ctx, c, "native.ResolveMove", http.MethodPost, sandboxPath(ref, "/resolve"), nil, o)
}

// NodeToken implements Backend.
func (s scoped) NodeToken(context.Context) (NodeToken, error) {
	return NodeToken{}, s.denied("letting nodes join")
}

// JoinNode implements Backend.
func (s scoped) JoinNode(context.Context, string, string) (NodeInfo, error) {
	return NodeInfo{}, s.denied("joining a node")
}

// Nodes implements Backend.
func (s scoped) Nodes(context.Context) ([]NodeInfo, error) { return nil, s.denied("listing nodes") }

// ForgetNode implements Backend.
func (s scoped) ForgetNode(context.Context, string) error { return s.denied("forgetting a node") }

// Carry implements Backend.
func (s scoped) Carry(context.Context, CarryRequest, func(carry.Progress)) (carry.Result, error) {
	return carry.Result{}, s.denied("copying between nodes")
}

// Stored implements Backend.
func (s scoped) Stored(context.Context) ([]carry.Stored, error) {
	return nil, s.denied("listing the object store")
}

// Unstore implements Backend.
func (s scoped) Unstore(context.Context, string) error {
	return s.denied("removing from the object store")
}

// Migrate implements Backend.
func (s scoped) Migrate(context.Context, string, string, func(carry.Progress)) (carry.Moved, error) {
	return carry.Moved{}, s.denied("moving a sandbox to another node")
}

// ResolveMove implements Backend.
func (s scoped) ResolveMove(context.Context, string, carry.ResolveOptions) (carry.Resolution, error) {
	return carry.Resolution{}, s.denied("ending the move of a sandbox")
}

func nodeRoutes() []route {
	return []route{
		on("GET", "/api/v1/nodes", "The nodes that this one trusts", func(c *call, _ none) ([]NodeInfo, error) {
			return c.backend.Nodes(c.ctx)
		}),
		on("POST", "/api/v1/nodes", "Join a node by its token", func(c *call, in JoinRequest) (NodeInfo, error) {
			return c.backend.JoinNode(c.ctx, in.Addr, in.Token)
		}),
		on("POST", "/api/v1/nodes/token", "A token with which one node can join this one, once", func(c *call, _ none) (NodeToken, error) {
			return c.backend.NodeToken(c.ctx)
		}),
		on("DELETE", "/api/v1/nodes/{ref}", "End the trust in a node", func(c *call, _ none) (none, error) {
			return none{}, c.backend.ForgetNode(c.ctx, c.ref())
		}),
		onStream("POST", "/api/v1/carry", "Copy a snapshot, an image or a model to another node, or from it", func(c *call, in CarryRequest, report func(carry.Progress)) (carry.Result, error) {
			return c.backend.Carry(c.ctx, in, report)
		}),
		on("GET", "/api/v1/store", "What is in the object store", func(c *call, _ none) ([]carry.Stored, error) {
			return c.backend.Stored(c.ctx)
		}),
		on("DELETE", "/api/v1/store", "Remove something from the object store, the query's ref", func(c *call, _ none) (none, error) {
			return none{}, c.backend.Unstore(c.ctx, c.r.URL.Query().Get("ref"))
		}, "ref"),
		onStream("POST", "/api/v1/sandboxes/{ref}/migrate", "Move a running sandbox to another node", func(c *call, in MigrateRequest, report func(carry.Progress)) (carry.Moved, error) {
			return c.backend.Migrate(c.ctx, c.ref(), in.Node, report)
		}),
		on("POST", "/api/v1/sandboxes/{ref}/resolve", "End a move that is under way or in doubt", func(c *call, in carry.ResolveOptions) (carry.Resolution, error) {
			return c.backend.ResolveMove(c.ctx, c.ref(), in)
		}),
	}
}
