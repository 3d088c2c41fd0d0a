package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/atoll-run/atoll/internal/wan"
)

// lived is what the machine does before it is saved, and again each time it is restored: so what that needs is learned.
const (
	lived  = `head -c 6000000 /dev/urandom > /dev/shm/hot; head -c 40000000 /dev/urandom > /dev/shm/cold; sync`
	answer = `sha256sum < /dev/shm/hot; ls -l / /usr/bin | sort | tail -n 3`
)

// runLate measures how long a machine takes to answer on a node that has not got its snapshot: once all of it was pulled, and
// while it comes.
func runLate(ctx context.Context, home string, loss float64) error {
	atoll, err := filepath.Abs("bin/atoll")
	if err != nil {
		return err
	}
	base := filepath.Join(home, "base")
	if err := prepare(ctx, atoll, base, "microvm"); err != nil {
		return fmt.Errorf("making the base image: %w", err)
	}
	l, err := wan.Open(slow(loss))
	if err != nil {
		return err
	}
	defer l.Close()
	a, b := sides(l, atoll, home, "microvm")
	defer a.end()
	defer b.end()
	if err := meet(ctx, a, b, base); err != nil {
		return err
	}
	id, err := a.saved(ctx)
	if err != nil {
		return err
	}
	// Each has what it needs without the snapshot, as nodes that run machines do.
	if _, err := b.run(ctx, "create", "base", "--name", "other", "--network", "none", "--memory", "512M"); err != nil {
		return err
	}
	for _, have := range []string{"has", "has not"} {
		for range lateRounds { // one after the other, so that what else the host does meets both
			for _, how := range []string{"--lazy", ""} {
				if have == "has not" {
					err = b.forget(ctx)
				}
				if err == nil {
					err = b.arrival(ctx, id, how, have)
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// lateRounds is how often each way is measured.
const lateRounds = 2

// forget has the node lose what machines are cloned from, as one that never ran any of this image.
func (s *side) forget(ctx context.Context) error {
	if _, err := s.run(ctx, "rm", "-f", "other"); err != nil {
		var none *exec.ExitError
		if !errors.As(err, &none) {
			return err
		}
	}
	for _, name := range []string{"templates", "bases"} {
		if err := os.RemoveAll(filepath.Join(s.home, "machines", name)); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(s.home, "machines", name), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// saved returns a snapshot of a machine that has lived, from which another was restored, so that what it needs is known.
func (s *side) saved(ctx context.Context) (id string, err error) {
	for _, args := range [][]string{
		{"create", "base", "--name", "worker", "--network", "none", "--memory", "512M"},
		{"exec", "worker", "--", "bash", "-c", lived + ";" + answer},
		{"snapshot", "worker", "-q"},
	} {
		if id, err = s.run(ctx, args...); err != nil {
			return "", err
		}
	}
	for _, args := range [][]string{
		{"restore", id, "--name", "teacher"},
		{"exec", "teacher", "--", "bash", "-c", answer},
		{"rm", "-f", "teacher"},
	} {
		if _, err := s.run(ctx, args...); err != nil {
			return "", err
		}
	}
	return id, nil
}

// arrival pulls the snapshot in one of two ways, restores it and has the machine answer.
func (s *side) arrival(ctx context.Context, id, how, have string) error {
	before := s.link.There.Bytes.Load()
	began := time.Now()
	args := []string{"snapshot", "pull", id, "node0", "-o", "json"}
	if how != "" {
		args = append(args, how)
	}
	out, err := s.run(ctx, args...)
	if err != nil {
		return err
	}
	var res struct {
		Size int64 `json:"size"`
		Held int64 `json:"held"`
	}
	if err := json.Unmarshal([]byte(out), &res); err != nil {
		return err
	}
	pulled := time.Since(began)
	if _, err := s.run(ctx, "restore", id, "--name", "worker"); err != nil {
		return err
	}
	restored := time.Since(began)
	if _, err := s.run(ctx, "exec", "worker", "--", "bash", "-c", answer); err != nil {
		return err
	}
	took, came := time.Since(began), s.link.There.Bytes.Load()-before
	fmt.Printf("pull %-6s of %.1f MB, %.1f MB of them held by a node that %s its template: pulled after %.1f s, restored after %.1f s, first work done after %.1f s, when %.1f MB had crossed the link\n", how,
		float64(res.Size)/1e6, float64(res.Held)/1e6, have, pulled.Seconds(), restored.Seconds(), took.Seconds(), float64(came)/1e6)
	if _, err := s.run(ctx, "rm", "-f", "worker"); err != nil {
		return err
	}
	for range 6000 { // what comes behind must have come before it is removed
		if _, err = s.run(ctx, "snapshot", "rm", id); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}
