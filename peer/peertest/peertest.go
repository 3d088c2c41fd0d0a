// Package peertest makes groups of nodes that can be joined, for tests.
package peertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/atoll-run/atoll/peer"
)

// Cert makes an authority and a certificate of it.
func Cert(t testing.TB, name string) tls.Certificate {
	t.Helper()
	now := time.Now()
	make := func(tmpl, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) []byte {
		tmpl.NotBefore, tmpl.NotAfter = now.Add(-time.Hour), now.Add(time.Hour)
		tmpl.SerialNumber, tmpl.Subject = big.NewInt(now.UnixNano()), pkix.Name{CommonName: name}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	var keys [2]*ecdsa.PrivateKey
	for i := range keys {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = key
	}
	tmpl := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	ca := make(tmpl, tmpl, keys[0], keys[0])
	authority, err := x509.ParseCertificate(ca)
	if err != nil {
		t.Fatal(err)
	}
	leaf := make(&x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature}, authority, keys[1], keys[0])
	return tls.Certificate{Certificate: [][]byte{leaf, ca}, PrivateKey: keys[1]}
}

// Node is a group that listens.
type Node struct {
	*peer.Group
	Addr   string
	Others net.Listener // connections that are no peer's
}

// Listen opens a group in a fresh directory, whose peers are answered by handler, and listens on a port of this host.
func Listen(t testing.TB, name string, handler http.Handler, public *tls.Config) *Node {
	t.Helper()
	return ListenAt(t, name, "", handler, public)
}

// ListenAt is Listen for a node that says at which site it is.
func ListenAt(t testing.TB, name, site string, handler http.Handler, public *tls.Config) *Node {
	t.Helper()
	g, err := peer.Open(peer.Config{Dir: t.TempDir(), Name: name, Site: site, Cert: Cert(t, name), Log: slog.New(slog.DiscardHandler), Handler: handler})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{Group: g, Addr: ln.Addr().String()}
	g.Advertise(n.Addr)
	n.Others = g.Split(ln, public)
	t.Cleanup(func() {
		_ = n.Others.Close()
		_ = g.Close()
	})
	return n
}

// Join makes a and b trust each other; a dials addr, behind which b is.
func Join(t testing.TB, a, b *Node, addr string) {
	t.Helper()
	token, err := b.Token()
	if err == nil {
		_, err = a.Join(t.Context(), addr, token)
	}
	if err != nil {
		t.Fatal(err)
	}
}
