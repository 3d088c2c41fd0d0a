package sandbox

import (
	"context"
	"io"
	"net"
	"time"
)

// Runtime makes sandboxes of one kind.
//
// A runtime is the truth about its own sandboxes and nothing more: names,
// owners, time-outs and templates belong to the node above it. All methods may
// be called from many goroutines; calls about one sandbox take effect one after
// another. A method that returns an error has changed nothing that the caller
// could see, or it has moved the sandbox to the Error state and said so by an
// event. Every error is an *Err.
//
// Sandboxes outlive the process that made them: after a crash, a runtime opened
// on the same directory lists them again (Running, or Error when they were
// lost) and can destroy them without a trace.
//
// What a runtime cannot do it says in Capabilities, and it answers a call for
// it with Unsupported. runtimetest is the suite that holds runtimes to this.
type Runtime interface {
	// Name is the word by which users choose the runtime: "gvisor".
	Name() string

	// Capabilities never changes during the life of the runtime.
	Capabilities() Capabilities

	// Create makes a sandbox and returns when its guest answers on GuestPort, or at
	// once if it is to have no agent (Spec.HasAgent).
	// It fails with Exists when the ID is taken, Invalid when the spec makes no
	// sense, Exhausted when the host has no room. A failed Create leaves nothing.
	Create(ctx context.Context, spec Spec) error

	// Dial opens a connection to a TCP port on the sandbox's loopback;
	// GuestPort always reaches the guest agent. It fails with NotFound for an
	// unknown sandbox, Conflict for one that is not running, and Unavailable
	// when nothing listens on the port.
	Dial(ctx context.Context, id string, port int) (net.Conn, error)

	// Pause freezes every process in memory; Resume lets them go on. Both are
	// idempotent.
	Pause(ctx context.Context, id string) error
	Resume(ctx context.Context, id string) error

	// Snapshot writes the sandbox's whole state into dir, an empty directory,
	// and syncs it to disk. Unless opts.Stop is set the sandbox goes on in the
	// state it was in. Open connections into the sandbox may be cut.
	Snapshot(ctx context.Context, id, dir string, opts SnapshotOptions) error

	// Restore makes a sandbox from the state in dir, which stays untouched and
	// may be restored any number of times, also at once. Root and Resources
	// must be as they were. It returns when the guest answers. Clock, entropy and host name
	// are as they were in the snapshot; the caller repairs them by the guest's /init.
	Restore(ctx context.Context, spec Spec, dir string) error

	// Send writes to w what Receive needs to make a running sandbox anew elsewhere,
	// from the snapshot in dir, which must be the last that was taken of it. It goes
	// on meanwhile, until little is left; then it is paused, and that is written too.
	// Send returns when all is written, and when the sandbox was stopped: it is
	// Paused then, also for a later process on the same directory, until Resume. When
	// Send fails the sandbox goes on. It fails with Unsupported for one that has to be
	// moved by another snapshot.
	Send(ctx context.Context, id, dir string, w io.Writer) (stopped time.Time, err error)

	// Receive makes a sandbox from the snapshot in dir and what Send writes, as
	// Restore does from the snapshot alone. When all of r has arrived it calls start,
	// which calls run once the sandbox may not run anywhere else any more, or fails;
	// then nothing is left of the sandbox. r is closed when it is not waited for any
	// more, and else at the end.
	Receive(ctx context.Context, spec Spec, dir string, r io.ReadCloser, start func(run func() error) error) error

	// Changes writes what the sandbox changed in its root as a tar stream in
	// the form of an OCI layer (whiteouts included).
	Changes(ctx context.Context, id string, w io.Writer) error

	// Stats reads what the sandbox uses now.
	Stats(ctx context.Context, id string) (Stats, error)

	// Destroy removes the sandbox and all that was made for it. It is
	// idempotent: an unknown id is no error.
	Destroy(ctx context.Context, id string) error

	// List returns every sandbox that exists, in the order of their IDs.
	List(ctx context.Context) ([]Status, error)

	// Watch delivers what happens to sandboxes without being asked for (a
	// sandbox died, ran out of memory) until ctx ends, then closes the channel.
	// A slow reader loses the oldest events, never the newest.
	Watch(ctx context.Context) <-chan Event

	// Close releases what the runtime holds in this process. Sandboxes go on.
	Close() error
}

// SnapshotOptions says how to take a snapshot.
type SnapshotOptions struct {
	// Ahead says that Send follows at once and is all that the snapshot is for: what has changed of the sandbox may be left out of
	// it, for Send to bring. Such a snapshot may not be restorable.
	Ahead bool
	Stop  bool // end the sandbox once the state is safe on disk, as for a pause that frees its memory
}

// Isolation ranks what stands between a sandbox and its host.
type Isolation string

// The isolation levels, weakest first.
const (
	IsolationProcess    Isolation = "process"     // the host's kernel, namespaces: not a security boundary
	IsolationUserKernel Isolation = "user-kernel" // a kernel in user space answers all system calls
	IsolationMachine    Isolation = "machine"     // a kernel of its own on virtual hardware
)

// AtLeast reports whether i is as strong as other.
func (i Isolation) AtLeast(other Isolation) bool {
	rank := map[Isolation]int{IsolationProcess: 1, IsolationUserKernel: 2, IsolationMachine: 3}
	return rank[i] >= rank[other]
}

// Capabilities is what a runtime can do. It is a value, so that it can travel
// between nodes.
type Capabilities struct {
	Isolation  Isolation     `json:"isolation"`
	Roots      []RootKind    `json:"roots"`
	Networks   []NetworkMode `json:"networks"`
	Pause      bool          `json:"pause"`      // Pause and Resume
	Snapshot   bool          `json:"snapshot"`   // Snapshot and Restore of files at least
	Memory     bool          `json:"memory"`     // snapshots hold memory and running processes too
	Live       bool          `json:"live"`       // Send and Receive
	Changes    bool          `json:"changes"`    // Changes
	Mounts     bool          `json:"mounts"`     // Spec.Mounts
	CPULimit   bool          `json:"cpuLimit"`   // Resources.CPUs is enforced
	MemLimit   bool          `json:"memLimit"`   // Resources.Memory is enforced
	DiskLimit  bool          `json:"diskLimit"`  // Resources.Disk is enforced
	PidsLimit  bool          `json:"pidsLimit"`  // Resources.Pids is enforced
	Persistent bool          `json:"persistent"` // sandboxes outlive the process that made them
	// Checks are patterns (path.Match) of the files of a snapshot that the runtime
	// itself compares with their digests when it reads them, which may be after
	// Restore: nobody needs to read them for that before.
	Checks []string `json:"checks,omitempty"`
	// Late are patterns of those of them that may still be on their way when Restore is called (package arrive).
	Late []string `json:"late,omitempty"`
	// Beside are names of files that Restore leaves beside a snapshot's own, for the next one: what it learned.
	Beside []string `json:"beside,omitempty"`
}
