package disk

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/zeebo/blake3"

	"github.com/atoll-run/atoll/sandbox"
)

// agentLabel is the name of the volume with the guest agent, agentFile that of its
// only file. AgentData looks for them.
const (
	agentLabel = "atoll"
	agentFile  = "atoll-guest"
)

// AgentData is vendor data that makes cloud-init put the agent of Agent's disk into
// the machine and start it. It leaves the user's own data as they are.
//
//go:embed agent.sh
var AgentData []byte

// maxAgent bounds the program, in bytes.
const maxAgent = 64 << 20

// Agent returns the path of an image in dir of a disk with the guest agent, which is
// at guest. It is made if it is missing; all machines with that agent share it.
func Agent(dir, guest string) (string, error) {
	const op = "disk.Agent"
	info, err := os.Stat(guest)
	if err != nil {
		return "", sandbox.E(op, "", guest, err)
	}
	if info.Size() > maxAgent {
		return "", sandbox.Errorf(op, sandbox.Invalid, guest, "%d bytes, at most %d are possible", info.Size(), maxAgent)
	}
	program, err := os.ReadFile(guest)
	if err != nil {
		return "", sandbox.E(op, "", guest, err)
	}
	sum := blake3.Sum256(program)
	path := filepath.Join(dir, fmt.Sprintf("agent-%x.iso", sum[:12]))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", sandbox.E(op, kindOf(err), dir, err)
	}
	tmp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return "", sandbox.E(op, kindOf(err), dir, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(isoImage(agentLabel, []isoFile{{agentFile, program}}))
	if err = errors.Join(err, tmp.Chmod(0o400), tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return "", sandbox.E(op, kindOf(err), path, err)
	}
	return path, nil
}
