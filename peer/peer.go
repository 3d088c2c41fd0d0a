// Package peer connects nodes that trust each other.
//
// Each node has a certificate authority of its own, and two nodes trust each other once each has the other's authority. The
// first of two hands out a token; the second shows it, over a connection whose other end it recognises by the token. From
// then on both prove who they are by a certificate of their authority, on every connection, in both directions.
//
// Peers speak HTTP/2 on the node's one port, recognised by the protocol that TLS negotiates. Who dials and who asks are
// independent: a node behind an address translator dials, turns the connection round, and is asked over it.
package peer

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Peer is a node that this one trusts.
type Peer struct {
	ID     string    `json:"id"`             // see IDOf
	Name   string    `json:"name"`           // as it calls itself; not unique
	Addr   string    `json:"addr"`           // host:port where it says that it is reached; may be wrong from here
	CA     []byte    `json:"ca"`             // its authority's certificate, DER
	Site   string    `json:"site,omitempty"` // where it says that it is, "region/place"; empty: it does not say
	Joined time.Time `json:"joined"`
}

// Config is what a Group stands on.
type Config struct {
	Dir  string          // one file for each peer
	Name string          // of this node
	Site string          // where this node is, "region/place"; may be empty
	Cert tls.Certificate // of this node, for both ends of a connection: leaf, then its authority
	Log  *slog.Logger
	Now  func() time.Time // nil means time.Now
	// Handler answers what peers ask; From says which one it is.
	Handler http.Handler
}

// Group is a node's peers and the connections to them. It is safe for use by several goroutines.
type Group struct {
	cfg       Config
	id        string
	authority *x509.Certificate

	mu             sync.Mutex
	addr           string // where this node is reached
	peers          map[string]Peer
	tokens         map[[32]byte]time.Time // hash of a token's secret to when it ends; at most maxTokens
	links, streams map[string]*Link       // open ones to peers that this node dialled, by ID
	turned         map[string]*Link       // those that a peer dialled and turned round
}

const maxPeerFile = 64 << 10 // bytes

// IDOf names a node by its authority: 20 hexadecimal digits of the hash of its public key.
func IDOf(authority *x509.Certificate) string {
	pin := pinOf(authority)
	return hex.EncodeToString(pin[:10])
}

// pinOf is the hash by which an authority is recognised.
func pinOf(authority *x509.Certificate) [32]byte {
	return sha256.Sum256(authority.RawSubjectPublicKeyInfo)
}

// Open reads the peers in cfg.Dir, which is made if need be.
func Open(cfg Config) (*Group, error) {
	const op = "peer.Open"
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if len(cfg.Cert.Certificate) != 2 {
		return nil, sandbox.Errorf(op, sandbox.Internal, cfg.Name, "a leaf and its authority are needed")
	}
	authority, err := x509.ParseCertificate(cfg.Cert.Certificate[1])
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, cfg.Name, err)
	}
	g := &Group{cfg: cfg, id: IDOf(authority), authority: authority, peers: make(map[string]Peer), tokens: make(map[[32]byte]time.Time),
		links: make(map[string]*Link), streams: make(map[string]*Link), turned: make(map[string]*Link)}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, sandbox.E(op, sandbox.Internal, cfg.Dir, err)
	}
	files, err := filepath.Glob(filepath.Join(cfg.Dir, "*.json"))
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, cfg.Dir, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return nil, sandbox.E(op, sandbox.Internal, f, err)
		}
		var p Peer
		if err := json.Unmarshal(data, &p); err != nil || p.check() != nil {
			cfg.Log.Error("a peer's file is damaged; join it again", "file", f)
			continue
		}
		g.peers[p.ID] = p
	}
	return g, nil
}

// check says what is wrong with a peer that came from elsewhere.
func (p Peer) check() error {
	ca, err := x509.ParseCertificate(p.CA)
	switch {
	case err != nil:
		return err
	case !ca.IsCA || IDOf(ca) != p.ID:
		return errors.New("the certificate is not that of the node's authority")
	case len(p.Name) > 200 || len(p.Addr) > 300 || len(p.Site) > 200 || strings.ContainsFunc(p.Name+p.Addr+p.Site, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return errors.New("the name or the address is no such thing")
	}
	return nil
}

// ID is this node's.
func (g *Group) ID() string { return g.id }

// Site is where this node is, "region/place"; empty when nobody said.
func (g *Group) Site() string { return g.cfg.Site }

// moved notes where a peer says that it is now.
func (g *Group) moved(id, site string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p, ok := g.peers[id]; ok && p.Site != site {
		p.Site = site
		if p.check() == nil {
			g.peers[id] = p
		}
	}
}

// Advertise sets where this node is reached; it is told to nodes that are joined from then on.
func (g *Group) Advertise(addr string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.addr = addr
}

// Addr is where this node is reached; empty when that is not known.
func (g *Group) Addr() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.addr
}

// self describes this node to another.
func (g *Group) self() Peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	return Peer{ID: g.id, Name: g.cfg.Name, Site: g.cfg.Site, Addr: g.addr, CA: g.authority.Raw}
}

// List returns the peers by name.
func (g *Group) List() []Peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]Peer, 0, len(g.peers))
	for _, p := range g.peers {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.ID, b.ID)) })
	return out
}

// Find returns the peer with this name, ID, or beginning of an ID.
func (g *Group) Find(ref string) (Peer, error) {
	const op = "peer.Find"
	var found []Peer
	for _, p := range g.List() {
		if p.ID == ref {
			return p, nil
		}
		if p.Name == ref && ref != "" || len(ref) >= 3 && strings.HasPrefix(p.ID, ref) {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return Peer{}, sandbox.Errorf(op, sandbox.NotFound, ref, "no such node").WithHint("see `atoll node ls`; `atoll node join` adds one")
	}
	return Peer{}, sandbox.Errorf(op, sandbox.Invalid, ref, "%d nodes are called or begin with this", len(found)).WithHint("give more of the id")
}

// Forget ends the trust in a peer and the connections to it. It may still trust us.
func (g *Group) Forget(ref string) error {
	p, err := g.Find(ref)
	if err != nil {
		return err
	}
	if err := os.Remove(g.file(p.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return sandbox.E("peer.Forget", sandbox.Internal, ref, err)
	}
	g.mu.Lock()
	delete(g.peers, p.ID)
	links := []*Link{g.links[p.ID], g.streams[p.ID], g.turned[p.ID]}
	g.mu.Unlock()
	for _, l := range links {
		if l != nil {
			l.close()
		}
	}
	return nil
}

func (g *Group) file(id string) string { return filepath.Join(g.cfg.Dir, id+".json") }

// named returns which node is called so: this one or a peer.
func (g *Group) named(name string) (id string, ok bool) {
	if name == g.cfg.Name {
		return g.id, true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.peers {
		if p.Name == name {
			return p.ID, true
		}
	}
	return "", false
}

// add trusts a peer from now on, whose name must be its own.
func (g *Group) add(p Peer) error {
	const op = "peer.Join"
	if err := p.check(); err != nil {
		return sandbox.E(op, sandbox.Invalid, p.ID, err)
	}
	if p.ID == g.id {
		return sandbox.Errorf(op, sandbox.Invalid, p.ID, "a node cannot join itself")
	}
	if id, taken := g.named(p.Name); taken && id != p.ID {
		return sandbox.Errorf(op, sandbox.Conflict, p.Name, "a node of this name is known already, which is another one: %s", id).
			WithHint("`atoll node rm` it if it is gone, or start one of the two with another `atoll up --name`")
	}
	p.Joined = g.cfg.Now().UTC().Truncate(time.Second)
	data, err := json.Marshal(p)
	if err == nil && len(data) > maxPeerFile {
		err = errors.New("its description is too long")
	}
	if err == nil {
		err = writeFile(g.file(p.ID), data)
	}
	if err != nil {
		return sandbox.E(op, sandbox.Internal, p.ID, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.peers[p.ID] = p
	return nil
}

// recognise returns the authority that a connection's other end proved, and the peer that it is, if it is one.
func (g *Group) recognise(chain []*x509.Certificate) (authority *x509.Certificate, p Peer, known bool, err error) {
	if len(chain) != 2 {
		return nil, p, false, errors.New("a leaf and its authority are needed")
	}
	authority = chain[1]
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	// Nodes' clocks may differ by years. Trust ends when a peer is forgotten, not by the calendar: a leaf is fresh at each
	// start, so that its own beginning is as good a time as any.
	at := chain[0].NotBefore.Add(time.Second)
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, p, false, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, known = g.peers[IDOf(authority)]
	return authority, p, known && bytes.Equal(p.CA, authority.Raw), nil
}

// writeFile replaces a file in one step that survives a power failure.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
