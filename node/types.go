package node

import (
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

// Sandbox is the record of one sandbox: what was asked for and what became of
// it. Records are values; change them through Node's methods.
type Sandbox struct {
	ID       string        `json:"id"`
	Name     string        `json:"name"` // unique among live sandboxes
	Team     string        `json:"team"`
	State    sandbox.State `json:"state"`
	Reason   string        `json:"reason,omitempty"` // why State is Error
	Runtime  string        `json:"runtime"`
	Image    string        `json:"image"`              // as asked for
	Template string        `json:"template,omitempty"` // ID of the template it came from; empty for a plain image
	Build    string        `json:"build,omitempty"`    // the template's build
	Parent   string        `json:"parent,omitempty"`   // ID of the snapshot it was restored or forked from

	Spec    sandbox.Spec          `json:"spec"`
	Policy  sandbox.NetworkPolicy `json:"policy"`
	Env     map[string]string     `json:"env,omitempty"` // for every process started inside
	User    string                `json:"user,omitempty"`
	Workdir string                `json:"workdir,omitempty"`
	// Command is what the image would run, entrypoint first; nil when it names none.
	Command []string `json:"command,omitempty"`
	// Main is what it was made for; nil when it was just made.
	Main *Main `json:"main,omitempty"`

	Metadata map[string]string `json:"metadata,omitempty"` // the user's; filterable
	Ports    []Port            `json:"ports,omitempty"`
	Volumes  []VolumeMount     `json:"volumes,omitempty"`

	// GuestToken must accompany every call to the guest; empty for sandboxes
	// that were asked for without one. TrafficToken must accompany traffic to
	// other ports when PublicTraffic is false. Neither is ever listed.
	GuestToken    string `json:"guestToken,omitempty"`
	TrafficToken  string `json:"trafficToken,omitempty"`
	PublicTraffic bool   `json:"publicTraffic"`

	CreatedAt time.Time  `json:"createdAt"`
	StartedAt time.Time  `json:"startedAt"`          // of the present run; moves at resume
	EndAt     *time.Time `json:"endAt,omitempty"`    // nil: lives until removed
	EndedAt   *time.Time `json:"endedAt,omitempty"`  // when it was terminated
	PausedAt  *time.Time `json:"pausedAt,omitempty"` // nil unless paused
	Lifecycle Lifecycle  `json:"lifecycle"`
	// Suspended is the snapshot that holds a sandbox paused on disk; empty for
	// one that runs or is frozen in memory.
	Suspended string `json:"suspended,omitempty"`
	// Moving is the node that the sandbox is leaving for; it must not run here
	// until that node has said that it does not run there. Empty as a rule.
	Moving string `json:"moving,omitempty"`
	// Moved is the node that the sandbox has moved to, where whoever asks for it here is sent. Empty as a rule.
	Moved string `json:"moved,omitempty"`
	// Moves is how often it has moved from one node to another; of the records of several nodes, the highest is of where it was last.
	Moves int `json:"moves,omitempty"`
	// Restarts is how often in a row it was lost and made anew.
	Restarts int `json:"restarts,omitempty"`
	// Pooled is the template for which this sandbox waits to be claimed; such
	// sandboxes are never listed. Empty for one that belongs to somebody.
	Pooled string `json:"pooled,omitempty"`
	// Internal marks a sandbox that the node made for a build of its own. It is
	// never listed and does not outlive the node's process.
	Internal bool `json:"internal,omitempty"`
}

// hidden reports whether the sandbox belongs to nobody but the node.
func (s Sandbox) hidden() bool { return s.Pooled != "" || s.Internal }

// Lifecycle says what happens by itself.
type Lifecycle struct {
	OnTimeout  TimeoutAction `json:"onTimeout,omitempty"`  // default: kill
	AutoResume bool          `json:"autoResume,omitempty"` // traffic resumes a paused sandbox
	// Remove ends the sandbox with its main command and drops the record as soon
	// as it has ended, as `--rm`.
	Remove bool `json:"remove,omitempty"`
	// Restart makes the sandbox anew when it was lost: its kernel crashed, say.
	Restart bool `json:"restart,omitempty"`
	// Idle is after how long without a connection and with hardly any work the
	// sandbox is paused; traffic resumes it. 0: never. It is looked at every few seconds.
	Idle time.Duration `json:"idle,omitempty"`
	// Timeout is granted anew when traffic resumes the sandbox.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// PauseMode says what is kept of a paused sandbox, and where.
type PauseMode string

// The ways to pause.
const (
	PauseFrozen PauseMode = "frozen" // all of it, in memory: the fastest, both ways
	PauseDisk   PauseMode = "disk"   // memory, processes and files, on disk
	PauseFiles  PauseMode = "files"  // the files only, on disk: it boots anew when it is resumed
)

// TimeoutAction is what becomes of a sandbox at its EndAt.
type TimeoutAction string

// The actions at a time-out.
const (
	TimeoutKill   TimeoutAction = "kill"
	TimeoutPause  TimeoutAction = "pause"       // as PauseDisk
	TimeoutShelve TimeoutAction = "pause-files" // as PauseFiles
)

// Port makes a sandbox's TCP port reachable on the host.
type Port struct {
	HostIP string `json:"hostIp"` // default 127.0.0.1
	Host   int    `json:"host"`   // 0: chosen by the host, filled in
	Guest  int    `json:"guest"`
}

// VolumeMount puts a named volume into a sandbox.
type VolumeMount struct {
	Name string `json:"name"`
	Path string `json:"path"`
}

// CreateRequest asks for a sandbox. Only Image is required.
type CreateRequest struct {
	Image    string   `json:"image"` // a template, an image, "host" or a repository's path
	Name     string   `json:"name,omitempty"`
	Team     string   `json:"team,omitempty"`
	Runtimes []string `json:"runtimes,omitempty"` // in order of preference; default: the node's

	Resources sandbox.Resources      `json:"resources"`
	Network   sandbox.NetworkMode    `json:"network,omitempty"` // default: sandbox where the node can, else none
	Policy    *sandbox.NetworkPolicy `json:"policy,omitempty"`  // nil: internet allowed
	Env       map[string]string      `json:"env,omitempty"`
	User      string                 `json:"user,omitempty"`
	Workdir   string                 `json:"workdir,omitempty"`
	Hostname  string                 `json:"hostname,omitempty"`
	Metadata  map[string]string      `json:"metadata,omitempty"`
	Labels    map[string]string      `json:"labels,omitempty"` // passed to the runtime
	Boot      *sandbox.Boot          `json:"boot,omitempty"`   // of a disk image; nil: all defaults
	Ports     []Port                 `json:"ports,omitempty"`
	Mounts    []sandbox.Mount        `json:"mounts,omitempty"`
	Volumes   []VolumeMount          `json:"volumes,omitempty"`

	Timeout       time.Duration `json:"timeout,omitempty"` // 0: none
	Lifecycle     Lifecycle     `json:"lifecycle"`
	Secure        bool          `json:"secure,omitempty"`        // give it a GuestToken
	PrivateAccess bool          `json:"privateAccess,omitempty"` // give it a TrafficToken, PublicTraffic false
	// Fresh boots from the image even where a template's snapshot or a pool
	// could answer faster.
	Fresh bool `json:"fresh,omitempty"`
}

// Filter narrows a listing. Zero fields do not narrow.
type Filter struct {
	Team     string
	States   []sandbox.State
	Metadata map[string]string // all must match
	Template string
	All      bool // terminated ones too
}

// ForkResult is one child of a fork, or why it could not be made.
type ForkResult struct {
	Sandbox *Sandbox `json:"sandbox,omitempty"`
	Err     error    `json:"-"`
}

// Snapshot is the record of a saved state; its manifest and data are in the
// snapshot store.
type Snapshot struct {
	ID       string            `json:"id"`
	Name     string            `json:"name,omitempty"`
	Team     string            `json:"team"`
	Parent   string            `json:"parent,omitempty"` // the snapshot that the sandbox came from
	Sandbox  string            `json:"sandbox"`          // whose state it is
	Runtime  string            `json:"runtime"`
	Memory   bool              `json:"memory"` // holds running processes
	Size     int64             `json:"size"`   // bytes on disk
	Created  time.Time         `json:"created"`
	Image    string            `json:"image"`
	Metadata map[string]string `json:"metadata,omitempty"`
	// Auto marks snapshots that the node made for itself (pauses, forks,
	// templates) and removes by itself.
	Auto string `json:"auto,omitempty"` // "pause", "fork", "template", "pool" or empty
	// Source is the sandbox's record when the snapshot was taken; a restore
	// starts from it.
	Source Sandbox `json:"source"`
}

// Template is a named, versioned starting point: an image, and optionally the
// snapshot of a sandbox in which the start command already runs.
type Template struct {
	ID        string            `json:"id"`
	Names     []string          `json:"names"` // aliases, unique per team
	Team      string            `json:"team"`
	Public    bool              `json:"public"`
	Builds    []Build           `json:"builds"`         // newest first
	Tags      map[string]string `json:"tags,omitempty"` // tag to build ID; "default" is what a plain name means
	Created   time.Time         `json:"created"`
	Updated   time.Time         `json:"updated"`
	LastUsed  *time.Time        `json:"lastUsed,omitempty"`
	Spawns    int64             `json:"spawns"` // sandboxes made from it
	Resources sandbox.Resources `json:"resources"`
}

// BuildState is how far a build has come.
type BuildState string

// The states of a build.
const (
	BuildWaiting  BuildState = "waiting"
	BuildBuilding BuildState = "building"
	BuildReady    BuildState = "ready"
	BuildFailed   BuildState = "error"
)

// Build is one version of a template.
type Build struct {
	ID        string            `json:"id"`
	State     BuildState        `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	Created   time.Time         `json:"created"`
	Finished  *time.Time        `json:"finished,omitempty"`
	Image     string            `json:"image,omitempty"`    // reference in the image store
	Root      string            `json:"root,omitempty"`     // digest of the image's root
	Snapshot  string            `json:"snapshot,omitempty"` // ID; empty when the template boots from its image
	Resources sandbox.Resources `json:"resources"`
	Tags      []string          `json:"tags,omitempty"` // that the template gets once the build is ready; none: the default one
	StartCmd  string            `json:"startCmd,omitempty"`
	ReadyCmd  string            `json:"readyCmd,omitempty"`
}

// LogLine is one line of a build's log.
type LogLine struct {
	Time  time.Time `json:"time"`
	Level string    `json:"level"` // debug, info, warn, error
	Text  string    `json:"text"`
	Step  string    `json:"step,omitempty"`
}

// Volume is a directory on this host that outlives sandboxes.
type Volume struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"` // unique per team
	Team    string    `json:"team"`
	Token   string    `json:"token"`
	Created time.Time `json:"created"`
}

// Pool keeps started sandboxes of one template ready to be claimed.
type Pool struct {
	Template string `json:"template"`
	Runtime  string `json:"runtime"`
	Size     int    `json:"size"`  // wanted
	Ready    int    `json:"ready"` // there now
}
