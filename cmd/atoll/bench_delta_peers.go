package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A deltaPeer is a program that makes deltas too.
type deltaPeer struct {
	name string
	args func(d *deltaBench) []string
	// size returns the bytes that it made or sent, given what it printed.
	size func(d *deltaBench, printed string) (int64, error)
	// store makes a folder that holds the old file, which is there already and not measured: what it grows by are the bytes.
	store func(d *deltaBench) [][]string
}

// deltaPeers are run as their users would. rsync works on a copy of the old file, as if that were at the other end.
var deltaPeers = []deltaPeer{
	{name: "rsync -z", args: func(d *deltaBench) []string {
		return []string{"rsync", "-z", "--inplace", "--no-whole-file", "--stats", d.newName, d.peerFile()}
	}, size: func(_ *deltaBench, printed string) (int64, error) { return rsyncTotal(printed) }},
	{name: "zstd --patch-from", args: func(d *deltaBench) []string {
		return []string{"zstd", "-3", "--long=31", "-q", "-f", "--patch-from=" + d.oldName, d.newName, "-o", d.peerFile()}
	}, size: fileSize},
	{name: "xdelta3", args: func(d *deltaBench) []string {
		return []string{"xdelta3", "-e", "-f", "-B", strconv.FormatInt(min(d.old.Size+1, 2<<30-1), 10), "-s", d.oldName, d.newName, d.peerFile()}
	}, size: fileSize},
	{name: "casync", args: func(d *deltaBench) []string { return d.casync("new", d.newName) }, size: folderSize,
		store: func(d *deltaBench) [][]string {
			return [][]string{{"mkdir", d.peerFile()}, d.casync("old", d.oldName)}
		}},
	{name: "restic", args: func(d *deltaBench) []string { return d.restic("backup", "-q", d.newName) }, size: folderSize,
		store: func(d *deltaBench) [][]string {
			return [][]string{d.restic("init", "-q"), d.restic("backup", "-q", d.oldName)}
		}},
}

// casync cuts a file where its content says so, into chunks that it compresses one by one.
func (d *deltaBench) casync(name, file string) []string {
	return []string{"casync", "make", "--store=" + d.peerFile(), filepath.Join(d.peerFile(), name+".caibx"), file}
}

func (d *deltaBench) restic(args ...string) []string {
	return append([]string{"restic", "--no-cache", "-r", d.peerFile()}, args...)
}

func (d *deltaBench) peerFile() string { return filepath.Join(d.dir, "peer") }

func fileSize(d *deltaBench, _ string) (int64, error) {
	info, err := os.Stat(d.peerFile())
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// folderSize adds up the files of the peer's folder.
func folderSize(d *deltaBench, _ string) (total int64, err error) {
	err = filepath.WalkDir(d.peerFile(), func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	return total, err
}

// run measures the program, or says why not.
func (p deltaPeer) run(ctx context.Context, d *deltaBench) (b besides, err error) {
	b.Name = p.name
	args := p.args(d)
	if _, err := exec.LookPath(args[0]); err != nil {
		b.Absent = args[0] + " is not installed"
		return b, nil
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.peerFile())) }()
	if args[0] == "rsync" {
		if err := copyRegular(ctx, d.oldName, d.peerFile()); err != nil {
			return b, err
		}
	}
	kept := int64(0)
	if p.store != nil {
		for _, args := range p.store(d) {
			if _, b.Absent, err = peerRun(ctx, args); err != nil || b.Absent != "" {
				return b, err
			}
		}
		if kept, err = p.size(d, ""); err != nil {
			return b, err
		}
	}
	before := processorTime(unix.RUSAGE_CHILDREN)
	printed, absent, err := peerRun(ctx, args)
	if b.Absent = absent; err != nil || absent != "" {
		return b, err
	}
	b.CPU = round(processorTime(unix.RUSAGE_CHILDREN) - before)
	b.Bytes, err = p.size(d, printed)
	b.Bytes -= kept
	return b, err
}

// peerRun runs a peer's command and returns what it printed, or why it failed; err says that it was stopped.
func peerRun(ctx context.Context, args []string) (printed, failed string, err error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "RESTIC_PASSWORD=bench")
	out, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return "", "", ctx.Err()
		}
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return "", fmt.Sprintf("%v: %s", err, line), nil
	}
	return string(out), "", nil
}

// copyRegular copies a file, sparse where it is zero.
func copyRegular(ctx context.Context, from, to string) error {
	if printed, err := exec.CommandContext(ctx, "cp", "--sparse=always", "--", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copying %s: %w: %s", from, err, printed)
	}
	return nil
}

var rsyncTotals = regexp.MustCompile(`(?m)^Total bytes (?:sent|received): ([0-9,]+)$`)

// rsyncTotal adds the bytes of both directions.
func rsyncTotal(printed string) (total int64, err error) {
	found := rsyncTotals.FindAllStringSubmatch(printed, -1)
	if len(found) != 2 {
		return 0, fmt.Errorf("rsync printed no totals: %s", printed)
	}
	for _, m := range found {
		n, err := strconv.ParseInt(strings.ReplaceAll(m[1], ",", ""), 10, 64)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}
