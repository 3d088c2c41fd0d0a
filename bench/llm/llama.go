package main

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// The prebuilt llama.cpp: its own binaries for each kind of CPU, chosen at run time, driven by its bindings for Node.
const npmPackage, npmVersion = "node-llama-cpp", "3.22.1"

//go:embed llama.mjs
var driver []byte

// llamaCPP is an installed llama.cpp.
type llamaCPP struct {
	dir     string
	release string // what it says of itself
}

func (l *llamaCPP) name() string { return npmPackage + "@" + npmVersion }

// findLlama installs llama.cpp into dir, unless it is there. The error says why there is none.
func findLlama(ctx context.Context, dir string) (*llamaCPP, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "@node-llama-cpp", "linux-x64")); err != nil {
		// One after the other: the second would come with binaries for every GPU.
		for _, name := range []string{npmPackage, "@node-llama-cpp/linux-x64"} {
			cmd := exec.CommandContext(ctx, "npm", "install", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", name+"@"+npmVersion)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				return nil, fmt.Errorf("npm install %s: %w: %s", name, err, out)
			}
		}
	}
	l := &llamaCPP{dir: dir}
	if err := os.WriteFile(filepath.Join(dir, "llama.mjs"), driver, 0o644); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, "node", filepath.Join(dir, "llama.mjs"), "release").Output()
	if err != nil {
		return nil, fmt.Errorf("llama.cpp does not start: %w", err)
	}
	l.release = string(out)
	return l, nil
}

// A llamaProcess answers a line of JSON with one.
type llamaProcess struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
	took float64 // seconds to load
}

// open starts llama.cpp on a model. With huge it reads the weights into huge pages; else it maps the file, as is its default.
func (l *llamaCPP) open(ctx context.Context, file string, tokens int, huge bool) (*llamaProcess, error) {
	cmd := exec.CommandContext(ctx, "node", filepath.Join(l.dir, "llama.mjs"), "serve", file, fmt.Sprint(tokens), fmt.Sprint(!huge), fmt.Sprint(batch))
	if huge {
		cmd.Env = append(os.Environ(), "GLIBC_TUNABLES=glibc.malloc.hugetlb=1")
	}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &llamaProcess{cmd: cmd, in: in, out: bufio.NewScanner(out)}
	if p.took, err = p.ask("load", 0); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

func (p *llamaProcess) ask(what string, n int) (float64, error) {
	if _, err := fmt.Fprintf(p.in, "{\"what\":%q,\"n\":%d}\n", what, n); err != nil {
		return 0, err
	}
	if !p.out.Scan() {
		return 0, errors.Join(errors.New("llama.cpp ended"), p.out.Err())
	}
	var answer struct{ Seconds float64 }
	if err := json.Unmarshal(p.out.Bytes(), &answer); err != nil {
		return 0, fmt.Errorf("llama.cpp said %q: %w", p.out.Text(), err)
	}
	return answer.Seconds, nil
}

func (p *llamaProcess) threads(n int) error {
	_, err := p.ask("threads", n)
	return err
}

func (p *llamaProcess) prefill(n int) (float64, error) { return p.ask("prefill", n) }

func (p *llamaProcess) decode(n int) (float64, error) { return p.ask("decode", n) }

func (p *llamaProcess) many(n int) (float64, error) {
	if _, err := p.ask("begin", 0); err != nil {
		return 0, err
	}
	return p.ask("many", n)
}

func (p *llamaProcess) loaded() (float64, int64) { return p.took, residentBytes(p.cmd.Process.Pid) }

func (p *llamaProcess) close() error { return errors.Join(p.in.Close(), p.cmd.Wait()) }
