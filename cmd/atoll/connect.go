package main

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/daemon"
	"github.com/atoll-run/atoll/sandbox"
)

// defaultAddr is where a daemon listens unless told otherwise.
const defaultAddr = "127.0.0.1:7700"

// probeTimeout bounds how long a daemon at an address that was only guessed is
// waited for.
const probeTimeout = time.Second

// open returns the daemon's backend, or that of a node which lives as long as
// this command. It is opened once and closed by execute.
func (a *app) open(ctx context.Context) (native.Backend, error) {
	b, err := a.openDaemon(ctx)
	if err == nil || !sandbox.Is(err, sandbox.NotFound) {
		return b, err
	}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	parts, err := daemon.OpenTransient(ctx, cfg)
	if err != nil {
		return nil, err
	}
	a.backend = native.NewLocal(parts.Node, parts.Keys, func() error {
		// The node is cleared away even when ctrl-c is why we end.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		return parts.CloseTransient(ctx)
	})
	return a.backend, nil
}

// closeTimeout bounds the removal of a transient node's sandboxes; what is left
// is removed by the next command.
const closeTimeout = 20 * time.Second

// openDaemon returns the backend of the daemon: the one at --addr, else the one
// of the state directory. Without one it fails with NotFound.
func (a *app) openDaemon(context.Context) (native.Backend, error) {
	if a.backend != nil {
		return a.backend, nil
	}
	home := daemon.Home(a.home)
	var url string
	ep, err := home.Endpoint()
	switch {
	case a.addr != "" && (err != nil || !sameAddr(ep.URL, a.addr)):
		// ATOLL_ADDR says both where `atoll up` listens and where to look. An
		// address at which nobody answers is an error only when it is another
		// machine's: then a node of our own is not what was meant.
		if !answers(a.addr) && isLoopback(a.addr) {
			return nil, noDaemon(a.addr)
		}
		url = a.addr
	case err == nil:
		url = ep.URL
	default:
		return nil, noDaemon("")
	}
	key := a.key
	if key == "" {
		secret, err := os.ReadFile(home.Credentials())
		if err != nil {
			return nil, sandbox.Errorf("atoll", sandbox.Denied, url, "no key for the daemon").
				WithHint("set ATOLL_API_KEY, or ATOLL_HOME to the daemon's state directory")
		}
		key = strings.TrimSpace(string(secret))
	}
	client, err := native.NewClient(url, key)
	if err != nil {
		return nil, err
	}
	a.daemonURL, a.backend = url, client
	return client, nil
}

func noDaemon(addr string) error {
	err := sandbox.Errorf("atoll", sandbox.NotFound, addr, "no daemon is running, and this needs one")
	return err.WithHint("start one with `atoll up`, or in the background with `atoll up -d`; `atoll run` works without")
}

// sameAddr reports whether a URL is that of a host and port.
func sameAddr(url, addr string) bool {
	_, host, _ := strings.Cut(url, "://")
	return host == addr || url == addr
}

func answers(addr string) bool {
	conn, err := net.DialTimeout("tcp", addr, probeTimeout)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func isLoopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || host == "" || ip != nil && (ip.IsLoopback() || ip.IsUnspecified()))
}

// config is what a node in this process needs.
func (a *app) config() (daemon.Config, error) {
	guest, err := bundled(a.home, guestName)
	if err != nil {
		return daemon.Config{}, err
	}
	sentry, err := bundled(a.home, sentryName)
	if err != nil {
		return daemon.Config{}, err
	}
	return daemon.Config{
		Home: daemon.Home(a.home), Guest: guest, Sentry: sentry, Version: version, Log: a.logger(slog.LevelError),
	}, nil
}

// logger logs to standard error from a level on, or everything with --debug.
func (a *app) logger(level slog.Level) *slog.Logger {
	if a.debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
}
