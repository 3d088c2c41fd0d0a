package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"os"
	"sync"
	"time"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/llm/host"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	sweepEvery      = time.Hour      // chunks of pushes that did not go on, and where the peers are
	sweepStoreEvery = 24 * time.Hour // what the object store need not keep: to list it costs money
)

// openPeers opens what connects this node to others.
func (p *Parts) openPeers(cfg Config, addr net.Addr) error {
	ca, err := p.Home.authority()
	if err != nil {
		return err
	}
	cert, err := ca.node()
	if err != nil {
		return err
	}
	stage, err := chunk.OpenDisk(p.Home.path("stage"), chunk.DiskOptions{})
	if err != nil {
		return err
	}
	p.closers = append(p.closers, stage)
	if p.cache, err = p.openCache(cfg); err != nil {
		return err
	}
	store, err := p.openStore(cfg)
	if err != nil {
		return err
	}
	carrier := carry.New(carry.Config{Node: p.Node, Snapshots: p.snapshots, Images: p.Node.Images(), Models: host.OpenStore(p.Home.Models()), Stage: stage, Cache: p.cache, Store: store, StoreRules: cfg.Kept,
		Pacer: pace.New(cfg.Uplink, pace.DefaultShares), Log: cfg.Log})
	name := cfg.Name
	if name == "" {
		if name, err = os.Hostname(); err != nil {
			name = p.Home.prefix()
		}
	}
	group, err := peer.Open(peer.Config{Dir: p.Home.path("peers"), Name: name, Site: cfg.Site, Cert: cert, Log: cfg.Log, Handler: carrier.Handler()})
	if err != nil {
		return err
	}
	p.closers = append(p.closers, group, carrier)
	carrier.Use(group)
	group.Advertise(advertised(addr.String()))
	p.peers = native.Peering{Group: group, Carrier: carrier}
	return nil
}

// tend ends moves that a restart interrupted, and sweeps, until ctx ends.
func tend(ctx context.Context, cfg Config, g *peer.Group, c *carry.Carrier) {
	var recovering sync.WaitGroup
	recovering.Go(func() { c.Recover(ctx) }) // which lasts as long as a peer is out of reach
	defer recovering.Wait()
	swept := time.Now()
	for tick := time.NewTicker(sweepEvery); ; {
		if time.Since(swept) > sweepStoreEvery {
			swept = time.Now()
			if err := c.SweepStore(ctx, swept); err != nil && ctx.Err() == nil {
				cfg.Log.Warn("sweeping the object store", "error", err)
			}
		}
		for _, p := range g.List() {
			if _, err := g.Ping(ctx, p); err != nil { // it says where it is
				cfg.Log.Debug("a node does not answer", "node", p.ID, "error", err)
			}
		}
		if err := c.Sweep(ctx, time.Now()); err != nil && ctx.Err() == nil {
			cfg.Log.Warn("sweeping chunks", "error", err)
		}
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
		}
	}
}

// node makes the certificate by which other nodes know this one, fresh at each start, for both ends of connections.
func (a *authority) node() (tls.Certificate, error) {
	const op = "daemon.node"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, sandbox.E(op, sandbox.Internal, "", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: peer.IDOf(a.cert)},
		NotBefore: time.Now().Add(-clockSkew), NotAfter: time.Now().Add(caLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return tls.Certificate{}, sandbox.E(op, sandbox.Internal, "", err)
	}
	return tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}, nil
}

// advertised turns the address that is listened on into one at which other machines reach this: the first global one, when
// all are listened on.
func advertised(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsUnspecified() {
		return addr
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return dialable(addr)
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return net.JoinHostPort(n.IP.String(), port)
		}
	}
	return dialable(addr)
}
