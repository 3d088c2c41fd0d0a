package daemon

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	caLife     = 10 * 365 * 24 * time.Hour
	serverLife = 397 * 24 * time.Hour // what browsers accept at most
	clockSkew  = time.Hour            // certificates begin this long before now
)

// authority is the certificate authority of one state directory. It is made at
// the first start with TLS and kept; clients trust Home.CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (h Home) authority() (*authority, error) {
	const op = "daemon.authority"
	keyFile := h.path("tls", "ca.key")
	certPEM, err := os.ReadFile(h.CA())
	if errors.Is(err, os.ErrNotExist) {
		return h.newAuthority(keyFile)
	}
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, h.CA(), err)
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, keyFile, err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, h.CA(), err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, sandbox.Errorf(op, sandbox.Internal, keyFile, "not an ECDSA key")
	}
	return &authority{cert: pair.Leaf, key: key}, nil
}

func (h Home) newAuthority(keyFile string) (*authority, error) {
	const op = "daemon.newAuthority"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "Atoll " + h.prefix()},
		NotBefore: time.Now().Add(-clockSkew), NotAfter: time.Now().Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	// The key first: a certificate without its key would stay useless for ever.
	if err := writeFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600); err != nil {
		return nil, sandbox.E(op, sandbox.Internal, keyFile, err)
	}
	if err := writeFile(h.CA(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return nil, sandbox.E(op, sandbox.Internal, h.CA(), err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, h.CA(), err)
	}
	return &authority{cert: cert, key: key}, nil
}

// server makes a certificate for the names and addresses, fresh at each start.
func (a *authority) server(hosts ...string) (*tls.Config, error) {
	const op = "daemon.server"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, "", err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: hosts[0]},
		NotBefore: time.Now().Add(-clockSkew), NotAfter: time.Now().Add(serverLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, host, "*."+host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return nil, sandbox.E(op, sandbox.Internal, hosts[0], err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2", "http/1.1"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}},
	}, nil
}

func serial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return new(big.Int).SetBytes(b[:])
}
