package peer

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	// TokenLife is how long a token can be used, once.
	TokenLife = 15 * time.Minute
	maxTokens = 64
	secretLen = 16

	tokenPrefix = "atoll1-"
)

// Token returns a token with which one node can join this one, once, within TokenLife. It does not survive a restart.
func (g *Group) Token() (string, error) {
	var secret [secretLen]byte
	_, _ = rand.Read(secret[:]) // never fails since Go 1.24
	now := g.cfg.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	for hash, end := range g.tokens {
		if now.After(end) {
			delete(g.tokens, hash)
		}
	}
	if len(g.tokens) >= maxTokens {
		return "", sandbox.Errorf("peer.Token", sandbox.Exhausted, "", "%d tokens are waiting to be used", len(g.tokens))
	}
	g.tokens[sha256.Sum256(secret[:])] = now.Add(TokenLife)
	pin := pinOf(g.authority)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(secret[:], pin[:]...)), nil
}

// parseToken takes a token apart: the secret, and the pin of the node that made it.
func parseToken(token string) (secret []byte, pin [32]byte, err error) {
	text, ok := strings.CutPrefix(strings.TrimSpace(token), tokenPrefix)
	b, err := base64.RawURLEncoding.DecodeString(text)
	if !ok || err != nil || len(b) != secretLen+len(pin) {
		return nil, pin, sandbox.Errorf("peer.Join", sandbox.Invalid, "", "this is no token").WithHint("`atoll node token` on the other node prints one")
	}
	copy(pin[:], b[secretLen:])
	return b[:secretLen], pin, nil
}

// spend uses a token up. Secrets are found by their hash, so that the time it takes says nothing about them.
func (g *Group) spend(secret []byte) bool {
	hash := sha256.Sum256(secret)
	g.mu.Lock()
	defer g.mu.Unlock()
	end, ok := g.tokens[hash]
	delete(g.tokens, hash)
	return ok && !g.cfg.Now().After(end)
}

// joinRequest is what a node that wants to join says, and its answer.
type joinRequest struct {
	Secret []byte `json:"secret,omitempty"` // of the token; empty in the answer
	Node   Peer   `json:"node"`
}

const (
	joinPath    = "/peer/v1/join"
	maxJoin     = 64 << 10 // bytes
	joinTimeout = 30 * time.Second
)

// Join makes this node and the one at addr trust each other, by a token of the latter.
func (g *Group) Join(ctx context.Context, addr, token string) (Peer, error) {
	const op = "peer.Join"
	secret, pin, err := parseToken(token)
	if err != nil {
		return Peer{}, err
	}
	ctx, stop := context.WithTimeout(ctx, joinTimeout)
	defer stop()
	conn, err := g.dial(ctx, addr, protocol, pin)
	if err != nil {
		return Peer{}, err
	}
	l := g.newLink(Peer{Addr: addr}, conn)
	defer l.close()
	var answer joinRequest
	if err := l.Call(ctx, http.MethodPost, joinPath, joinRequest{secret, g.self()}, &answer); err != nil {
		return Peer{}, err
	}
	p := answer.Node
	p.Addr = addr // which worked
	if authority := conn.ConnectionState().PeerCertificates[1]; IDOf(authority) != p.ID {
		return Peer{}, sandbox.Errorf(op, sandbox.Denied, addr, "the node claims to be another one")
	}
	if err := g.add(p); err != nil {
		return Peer{}, err
	}
	return p, nil
}

// serveJoin answers a node that wants to join and has proven that it has the authority in its certificate.
func (g *Group) serveJoin(w http.ResponseWriter, r *http.Request) {
	const op = "peer.Join"
	var req joinRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxJoin)).Decode(&req); err != nil {
		Fail(w, sandbox.E(op, sandbox.Invalid, "", err))
		return
	}
	authority, _, _, err := g.recognise(r.TLS.PeerCertificates)
	switch {
	case err != nil || req.Node.ID != IDOf(authority) || string(req.Node.CA) != string(authority.Raw):
		Fail(w, sandbox.Errorf(op, sandbox.Denied, req.Node.ID, "the node is another one than it claims to be"))
		return
	case !g.spend(req.Secret):
		g.cfg.Log.Warn("a node tried to join with a token that is not good", "node", req.Node.ID, "from", r.RemoteAddr)
		Fail(w, sandbox.Errorf(op, sandbox.Denied, req.Node.ID, "the token was used, is too old, or is another node's").
			WithHint("get a fresh one with `atoll node token`"))
		return
	}
	if err := g.add(req.Node); err != nil {
		Fail(w, err)
		return
	}
	g.cfg.Log.Info("a node joined", "node", req.Node.ID, "name", req.Node.Name, "addr", req.Node.Addr)
	Answer(w, joinRequest{Node: g.self()})
}
